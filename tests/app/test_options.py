"""Every option of every experiment refuses values of a wrong type by name, and takes the ones that it has."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from app.options import check_options
from models.functional.errors import UsageError

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["paths.run_dir=run", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return cfg


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_an_experiment_sets_has_the_right_type(name):
    check_options(composed(f"experiment={name}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=abc", "seed=abc should be a valid integer"),
        ("seed=1.5", "seed=1.5 should be a valid integer"),
        ("seed=null", "seed=null should be a valid integer"),
        ("ckpt_path=3", "ckpt_path=3 should be a valid string"),
        ("data.batch_size=abc", "data.batch_size=abc should be a valid integer"),
        ("data.train_rows=null", "data.train_rows=null should be a valid integer"),
        ("module.weight_decay=[1]", r"module.weight_decay=\[1\] should be a valid number"),
        ("module.forwards=2", "module.forwards=2 should be a valid"),
        ("module.forwards=[a]", "module.forwards"),
        ("teacher.module.lr=fast", "teacher.module.lr=fast should be a valid number"),
        ("trainer.max_steps=many", "trainer.max_steps=many should be a valid integer"),
        ("callbacks.progress.stage=[1]", r"callbacks.progress.stage=\[1\] should be a valid string"),
        (
            "callbacks.export=abc",
            "callbacks.export=abc is no part of a run; type callbacks.export=null to do without it",
        ),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0 must be at least 1"),
        ("callbacks.checkpoint.save_top_k=all", "callbacks.checkpoint.save_top_k=all should be a valid integer"),
    ],
)
def test_values_of_a_wrong_type_are_named(override, message):
    with pytest.raises(UsageError, match=message):
        check_options(composed("experiment=meanflow_llada", override))


@pytest.mark.parametrize(
    "override",
    [
        "module.sigma=1",
        "trainer.max_steps=-1",
        "ckpt_path=last",
        "trainer.precision=16",
        "data.num_workers=2",
        "temperature=0",
    ],
)
def test_other_ways_of_writing_a_right_value_are_taken(override):
    check_options(composed("experiment=meanflow_llada", override))


def test_what_is_built_or_missing_is_left_to_its_maker():
    target = {"_target_": "callbacks.ema.TrainableEMA", "decay": 0.5}
    cfg = OmegaConf.create(dict.fromkeys(("ckpt_path", "student_path", "forwards", "temperature")) | {
        "seed": 0, "samples": 3, "n": 1, "optimized_metric": "val/loss", "compile": None, "recompute": False,
        "part": {"_target_": "callbacks.progress.StageProgress", "stage": "???"},
        "list": {"_target_": "builtins.list", "of": [target]},
    })  # fmt: skip
    check_options(cfg)
    cfg.list.of[0].decay = "x"
    check_options(cfg)  # inside a list it is checked when it is made
