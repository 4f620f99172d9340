"""Every experiment, student and objective of conf/ composes, and runs a step of every stage."""

import inspect
import json

import pytest
from helpers.daily import daily
from helpers.experiment import ROOT, SMALL, answer, model_overrides, pairs_overrides
from hydra.utils import get_method, instantiate
from lightning import Callback

from app import build, modes
from app.build import untrained
from app.options import check_options
from models.backbones.llada import LladaModel, build_llada
from models.backbones.sizes import STAND_IN
from models.functional.errors import UsageError
from reporting.console import sentence_for

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


UNSCORED = ("flow_lm1b", "flow_owt", "meanflow_text")  # without a judge nothing is known of their texts


LONGER = (
    "concept_dropout",
    "concept_e2e_code",
    "concept_rate",
    "concept_signals",
    "meanflow_noisy_mask",
)  # and like others


@pytest.mark.parametrize("name", daily(EXPERIMENTS, *(name for name in EXPERIMENTS if name not in LONGER)))
def test_every_experiment_runs_one_step_of_every_stage(configure, tmp_path, capsys, name):
    plain = configure(f"experiment={name}")
    small = [*model_overrides(plain, tmp_path), *pairs_overrides(plain, tmp_path)]
    rows = [] if plain.study else ["data.eval_batch_size=8"]
    cfg = configure(f"experiment={name}", "trainer.fast_dev_run=true", *rows, *small)
    modes.fit(cfg)
    printed = capsys.readouterr().out
    assert cfg.name.split("/")[0] == name
    assert ("C" if cfg.study else f"seed {cfg.seed}") in printed
    last = printed.strip().splitlines()[-1]  # what happened, in one line
    assert cfg.study or (last.endswith(".") and last.startswith("·") == (name in UNSCORED))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # a shortened teacher is never kept
    header = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert f"python run.py experiment={name}" in header


# one of those that have the same callbacks
CALLBACKS = ["block_draft_oracle", "concept_oracle", "concept_online_oracle", "masked_from_causal", "meanflow_llada"]
CALLBACKS += ["meanflow_text", "objectives", "qstar_gaussian", "qstar_oracle"]


@pytest.mark.parametrize("name", daily(EXPERIMENTS, *CALLBACKS))
def test_every_experiment_can_do_without_any_of_its_callbacks(configure, name):
    """No part of the configuration reads an option of a callback that may be null, and each can be built without it."""
    cfg = configure(f"experiment={name}")
    recipes = [cfg.teacher, *(cfg.pair or {}).values()]
    parts = [cfg.callbacks, *(recipe.callbacks for recipe in recipes if recipe is not None)]
    for part in parts:
        for callback in part:
            kept = part[callback]
            part[callback] = None
            check_options(cfg)
            for built in (instantiate(one) for own in parts for one in own.values() if one is not None):
                assert isinstance(built, Callback)
            assert build._callbacks(cfg)
            part[callback] = kept


STUDENTS = sorted(path.stem for path in (ROOT / "conf" / "training").glob("*.yaml"))
TAUGHT = ["meanflow_llada", "meanflow_scan", "meanflow_e2e", "meanflow_text", "meanflow_from_causal"]


@pytest.mark.slow
@pytest.mark.parametrize("module", STUDENTS)
def test_every_student_fits_every_experiment_with_a_teacher(configure, module):
    """One word switches, callbacks and steps included: no experiment sets an option that only one student has."""
    alone = configure("experiment=meanflow_llada", f"module={module}")
    assert ("monitor" in alone.callbacks) == ("noisy_mask" in module)
    for name in TAUGHT:
        cfg = configure(f"experiment={name}", f"module={module}")
        assert cfg.trainer.max_steps == alone.trainer.max_steps or name in (
            "meanflow_scan",
            "meanflow_e2e",
            "meanflow_text",
            "meanflow_from_causal",
        )
        stand_in = build_llada(vocab_size=5, mask_token_id=2, eos_token_id=1, pad_token_id=0, **STAND_IN)
        assert instantiate(cfg.module, _convert_="all", teacher=stand_in).teacher is stand_in


@pytest.mark.parametrize("name", TAUGHT)
def test_a_published_model_fits_every_experiment(configure, name):
    cfg = configure(f"experiment={name}", "model=llada_8b", "model.path=somewhere")
    accepted = inspect.signature(get_method(cfg.model._target_)).parameters
    assert set(cfg.model) - {"_target_"} <= set(accepted)


OBJECTIVES = {path.stem for path in (ROOT / "conf/module/objective").glob("*.yaml")}
OF_PRETRAINED = {"causal_to_masked"}  # run by experiment=masked_from_causal
BLOCKS = {"block_diffusion": ["module.objective.block_length=3"]}  # of a response of 6 tokens


@pytest.mark.parametrize(
    "objective", daily(sorted(OBJECTIVES - OF_PRETRAINED), "masked_diffusion", "latent", "block_diffusion")
)
def test_every_objective_runs_and_is_a_row_of_the_report(configure, tmp_path, capsys, objective):
    short = ["data.train_rows=64", "data.test_rows=32", "data.batch_size=16", "data.size=tiny", "module.forwards=[1,2]"]
    short += BLOCKS.get(objective, [])
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=2", "logger=none"]
    choice = f"module/objective={objective}"
    folder = tmp_path / "out" / "objectives" / objective / "run"
    place = [f"paths.run_dir={folder}", "callbacks.goal.below=100"]
    cfg = configure("experiment=objectives", choice, *short, *steps, *SMALL, *place)
    assert cfg.name == f"objectives/{objective}"
    modes.fit(cfg)
    record = json.loads((folder / "record.json").read_text())
    (model,) = (row for row in record["rows"] if row["method"] == "model")
    found = model["quality"]
    assert found["flops_per_step"] > 0
    assert found["train_flops"] == 4 * found["flops_per_step"]
    assert found["train_tokens"] == 4 * 16 * 6
    assert 0 <= found["probe"] <= 1
    likelihood = [name for name in ("nll", "nll_bound") if name in found]
    assert len(likelihood) == (objective not in ("latent", "continuous_diffusion"))
    assert ("goal_tokens" in found) == bool(likelihood)
    assert set(model["curve"]) == ({"steps", "tokens", "nll", "nll_truth"} if likelihood else set())
    capsys.readouterr()
    ask = ["experiment=objectives", choice, *short, *SMALL, "mode=generate", "prompt='who=anna'"]
    if objective == "latent":
        with pytest.raises(UsageError, match="predicts no tokens"):
            modes.generate(configure(*ask))
    else:  # from the checkpoint, whole and as it is written
        said = answer(configure(*ask), capsys)
        assert said == answer(configure(*ask, "stream=true"), capsys)
        again = folder.with_name("again")
        modes.export(configure("experiment=objectives", choice, *short, *SMALL, f"paths.run_dir={again}"))
        assert (again / "model" / "README.md").is_file()
        assert said == answer(configure(*ask), capsys)
    modes.report(configure("mode=report"))
    assert f"objectives/{objective}" in (tmp_path / "out" / "report" / "frontier.md").read_text()
    assert (tmp_path / "out" / "report" / "learning.png").exists() == bool(likelihood)


def test_a_budget_of_flops_sets_the_steps(configure, tmp_path):
    short = [
        "experiment=objectives",
        "data.train_rows=64",
        "data.test_rows=16",
        "data.size=tiny",
        "module.forwards=[1]",
        "logger=none",
        *SMALL,
    ]
    modes.fit(configure(*short, "trainer.max_steps=1", "data.batch_size=16"))
    record = tmp_path / "out" / "x" / "run" / "record.json"
    per_step = json.loads(record.read_text())["rows"][-1]["quality"]["flops_per_step"]
    modes.fit(configure(*short, "data.batch_size=16", f"callbacks.budget.flops={3.5 * per_step}"))
    assert json.loads(record.read_text())["rows"][-1]["quality"]["train_flops"] == 3 * per_step
    with pytest.raises(UsageError, match=r"callbacks.budget.flops=10 is less than one step"):
        modes.fit(configure(*short, "data.batch_size=16", "callbacks.budget.flops=10"))


def test_llada_8b_composes_and_says_what_it_needs_before_reading_anything(configure, monkeypatch):
    import models.backbones.memory as memory

    monkeypatch.setattr(memory, "available_memory", lambda device: 2 * 2**30)
    cfg = configure("model=llada_8b", "teacher=masked_diffusion")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        instantiate(cfg.model)
    assert "GiB" in sentence_for(caught.value)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["experiment=concept_rate"], "concept_rate/planned_2x16"),
        (["experiment=concept_rate", "module/code=hash", "module.types.a.most=3"], "concept_rate/hash_3x16"),
        (["experiment=concept_rate", "module/code=leading"], "concept_rate/leading_2"),
        (["experiment=concept_rate", "module/code=surprisal", "module.tokens=5"], "concept_rate/surprisal_5"),
        (["experiment=concept_e2e_code"], "concept_e2e_code/leading_7"),
        (["experiment=concept_oracle", "+module/code=leading"], "concept_oracle"),
        (["experiment=objectives", "module/objective=latent"], "objectives/latent"),
        (["experiment=concept_online_plain", "model.num_hidden_layers=5"], "concept_online_plain/5_layers"),
    ],
)
def test_the_runs_of_a_sweep_have_names_of_their_own(configure, options, name):
    assert configure(*options).name == name


@pytest.mark.parametrize(("objective", "attention"), [("latent", "causal"), ("masked_lm", "bidirectional")])
def test_a_fresh_model_has_the_attention_that_its_objective_needs(configure, objective, attention):
    """The model that is built, and the configuration that the record holds."""
    cfg = configure(
        "experiment=objectives", f"module/objective={objective}", "data.size=tiny", "data.train_rows=16", *SMALL
    )
    module, _ = untrained(cfg)
    assert isinstance(module.model, LladaModel) == (attention == "bidirectional")
    assert cfg.model.attention == attention
