"""Hugging Face folders as users bring them, through whole runs: each works, or is answered with what to type."""

import importlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers.daily import daily
from helpers.foreign import FOLDERS, REFUSED, WORDS, foreign_model, foreign_tokenizer, save_foreign
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors.torch import load_file

from app import modes
from lightning_modules.pretrain import PretrainModule
from models.backbones.causal_lm import load_trained
from models.backbones.judge import load_judge
from models.functional.errors import UsageError
from models.functional.generated_text import JudgedText
from models.functional.vocabulary import vocabulary_size
from models.objectives.next_token import NextToken
from reporting.console import sentence_for

generate = importlib.import_module("app.generate")  # the module, whose function has the same name
FAST = [
    "trainer.accelerator=cpu",
    "logger=none",
    "trainer.max_steps=2",
    "module.lr=1e-2",
    "trainer.limit_test_batches=1",
]


def pairs(folder: Path) -> list[str]:
    """Prompts with responses of at most 8 tokens."""
    rows = [{"prompt": f"jump {k}", "response": f"up {k}"} for k in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    fields = ["data.prompt_field=prompt", "data.response_field=response", "data.batch_size=8", "data.eval_batch_size=4"]
    return [*fields, *(f"data.{split}={folder}/rows.jsonl" for split in ("train", "val", "test"))]


def text(folder: Path) -> list[str]:
    (folder / "text.txt").write_text("".join(f"A paragraph about {k}.\n\n" for k in range(60)))
    return [f"data.train={folder}/text.txt", "data.cut=blank_line", "data.sequence_length=16"]


def options(experiment: str, folder: Path, tmp_path: Path) -> list[str]:
    """Of an experiment on a folder, small."""
    name, *more = experiment.split()
    own = [f"experiment={name}", *more, *FAST]
    if name == "qstar_qwen":
        models = [f"pair.theta.path={folder}", f"pair.target.path={folder}", "pair.theta.dtype=float32"]
        return [*own, *pairs(tmp_path), *models, "module.lora_rank=2"]
    data = pairs(tmp_path) if name in ("concept_qwen", "masked_from_causal") or "data=pairs" in more else text(tmp_path)
    return [*own, *data, f"model.path={folder}", "model.lora_rank=2"]


EXPERIMENTS = [
    "next_token_qwen data=pairs",
    "next_token_qwen",
    "concept_qwen",
    "concept_online_qwen module.codes=8",
    "qstar_qwen module.cache=false",
    "masked_from_causal model.mask_token=@ module.forwards=[1]",
]
# layers or parts that an experiment cannot split
REFUSED_BY = {
    "concept_online_qwen module.codes=8": {
        "sliding window": "full causal attention",
        "short window": "full causal attention",
        "tied gpt2": "gpt2 has no embed_tokens",
        "files of gpt2": "gpt2 has no embed_tokens",
    },
    "concept_qwen": {"short window": "a window of 8 tokens"},
    "masked_from_causal model.mask_token=@ module.forwards=[1]": {
        "sliding window": "layers of sliding_attention",
        "short window": "layers of sliding_attention",
    },
}


def by_default() -> set[tuple[str, str]]:
    """What the default run has: some oddities in one experiment, and some experiments with one oddity."""
    return {(EXPERIMENTS[0], oddity) for oddity in list(FOLDERS)[::6]} | {
        (name, "wider output") for name in EXPERIMENTS[:4]
    }


def cases() -> list:
    return [
        pytest.param(experiment, oddity, marks=() if (experiment, oddity) in by_default() else pytest.mark.slow)
        for experiment in EXPERIMENTS
        for oddity in FOLDERS
    ]


@pytest.mark.parametrize(("experiment", "oddity"), cases())
def test_a_folder_is_trained_exported_and_answers(configure, tmp_path, capsys, experiment, oddity):
    folder = FOLDERS[oddity](tmp_path / "it's mine = [1]")
    typed = [
        option.replace(str(folder), f"'{folder}'".replace("it's", "it\\'s"))
        for option in options(experiment, folder, tmp_path)
    ]
    name = experiment.split()[0]
    run = tmp_path / "out" / name / "run"
    steps = [] if name != "qstar_qwen" else ["trainer.precision=32-true"]
    refused = REFUSED_BY.get(experiment, {}).get(oddity)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*past_key_values", FutureWarning)
        if refused:
            with pytest.raises((UsageError, InstantiationException), match=refused):
                modes.fit(configure(*typed, *steps, f"paths.run_dir={run}"))
            return
        modes.fit(configure(*typed, *steps, f"paths.run_dir={run}"))
        # the folder that a run leaves, and the one that mode=export writes, are read by mode=generate
        asked = [*typed, "mode=generate", "prompt='jump 3'", "temperature=1", "n=4"]
        capsys.readouterr()
        modes.generate(configure(*asked))
        assert capsys.readouterr().out.count("jump 3 →") == 4
        if (experiment, oddity) in by_default():
            return
        modes.export(configure(*typed, *steps, "mode=export", f"paths.run_dir={tmp_path}/out/{name}/exported"))
        modes.generate(configure(*asked))


@pytest.mark.parametrize("oddity", REFUSED)
def test_a_folder_that_cannot_work_is_answered_with_what_to_type(configure, tmp_path, oddity):
    make, sentence = REFUSED[oddity]
    folder = make(tmp_path / "folder")
    with pytest.raises((UsageError, InstantiationException)) as error:
        modes.fit(configure(*options("next_token_qwen data=pairs", folder, tmp_path)))
    told = sentence_for(error.value)
    assert sentence in told
    assert "type" in told.lower()


@pytest.mark.parametrize(
    ("experiment", "context"),
    [("next_token_qwen data=pairs", 15), ("next_token_qwen", 15), ("concept_qwen", 20), ("qstar_qwen", 15)],
)
def test_rows_beyond_the_context_are_refused_before_they_are_read(configure, tmp_path, experiment, context):
    """GPT-2 has a table of positions: one more is an error deep inside it."""
    folder = save_foreign(tmp_path / "gpt2", foreign_model("gpt2", n_positions=context), foreign_tokenizer())
    own = options(experiment, folder, tmp_path)
    with pytest.raises(UsageError, match="positions"):
        modes.fit(configure(*own))


def test_a_prompt_beyond_the_context_is_refused(configure, tmp_path):
    folder = save_foreign(tmp_path / "gpt2", foreign_model("gpt2"), foreign_tokenizer())
    own = options("next_token_qwen", folder, tmp_path)
    modes.fit(configure(*own, f"paths.run_dir={tmp_path}/out/next_token_qwen/run"))
    with pytest.raises(UsageError, match=r"a prompt of 61 tokens .* do not fit the model, which has 64 positions"):
        modes.generate(configure(*own, "mode=generate", f"prompt={'a' * 60}"))


@pytest.mark.slow
def test_two_models_with_different_padding_of_the_output_layer_meet_in_q_star(configure, tmp_path, capsys):
    folders = [
        save_foreign(tmp_path / f"{size}", foreign_model("qwen3", vocab_size=size, seed=size), foreign_tokenizer())
        for size in (WORDS + 4, WORDS + 20)
    ]
    own = options("qstar_qwen", folders[0], tmp_path)
    own = [*own, f"pair.target.path={folders[1]}", "pair.target.dtype=float32", "trainer.precision=32-true"]
    modes.fit(configure(*own, f"paths.run_dir={tmp_path}/out/qstar_qwen/run"))
    rows = json.loads((tmp_path / "out/qstar_qwen/run/record.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"teacher", "student"}


def test_a_merged_folder_has_the_logits_of_the_adapter(configure, tmp_path):
    """Also of a tied model that is stored in bfloat16, up to the rounding of its weights."""
    model = foreign_model("llama", tie_word_embeddings=True).to(torch.bfloat16)
    folder = save_foreign(tmp_path / "tied", model, foreign_tokenizer())
    run = tmp_path / "out" / "next_token_qwen" / "run"
    modes.fit(configure(*options("next_token_qwen data=pairs", folder, tmp_path), f"paths.run_dir={run}"))
    ids = torch.arange(5, 20).unsqueeze(0)
    adapted, merged = (load_trained(run / name).float()(input_ids=ids).logits for name in ("model", "model_merged"))
    base = load_trained(folder).float()(input_ids=ids).logits
    assert (adapted - base).abs().max() > 2 * (adapted - merged).abs().max()
    assert "lm_head.weight" not in load_file(run / "model_merged" / "model.safetensors")


def test_any_causal_model_judges_texts_of_its_tokenizer(tmp_path):
    model, ids = foreign_model("gemma2", vocab_size=WORDS + 20), torch.randint(2, WORDS, (3, 12))
    judge = load_judge(save_foreign(tmp_path / "judge", model, foreign_tokenizer()))
    found = judge([JudgedText(row, [True] * len(row)) for row in ids.tolist()])
    log_p = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    wanted = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)
    assert torch.allclose(found.nats, wanted.double(), atol=1e-3)
    assert found.tokens.tolist() == [11, 11, 11]


def test_a_judge_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no tokenizer"):
        load_judge(save_foreign(tmp_path / "judge", foreign_model("llama"), None))


def test_texts_end_at_every_end_token_of_the_folder(configure, tmp_path):
    folder = FOLDERS["several ends"](tmp_path / "folder")
    for experiment in ("next_token_qwen data=pairs", "next_token_qwen"):
        data = instantiate(configure(*options(experiment, folder, tmp_path)).data)
        data.setup()
        (a, b, c) = data.encode_texts(["abc"])[0]
        assert data.decode_responses(torch.tensor([[a, b, 260, c], [a, 1, b, c]])) == ["ab", "a"]


@pytest.mark.parametrize("name", daily(["next_token_qwen", "concept_qwen", "qstar_qwen"], "next_token_qwen"))
def test_a_model_stops_at_every_end_token_after_its_run_too(configure, tmp_path, monkeypatch, name):
    """What generates is given the end tokens of the folder, which a run keeps with its tokenizer."""
    folder = FOLDERS["several ends"](tmp_path / "folder")
    own = [*options(name, folder, tmp_path), "trainer.precision=32-true"]
    modes.fit(configure(*own, f"paths.run_dir={tmp_path}/out/{name}/run"))
    if name != "qstar_qwen":  # a pair is read from its folders alone
        (folder / "generation_config.json").unlink()
    find, given = generate.find_decoder, []

    def found(*about):
        given.append(find(*about))
        return given[0]

    monkeypatch.setattr(generate, "find_decoder", found)
    modes.generate(configure(*own, "mode=generate", "prompt=jump"))
    ends = given[0].options["end_ids"] if name == "next_token_qwen" else given[0].end_ids
    assert ends[0] == 1
    assert 260 in ends


def test_ids_without_a_token_do_not_hide_those_beyond_them(configure, tmp_path):
    folder = FOLDERS["ids without a token"](tmp_path / "folder")
    data = instantiate(configure(*options("next_token_qwen data=pairs", folder, tmp_path)).data)
    data.setup()
    assert len(data.tokenizer) < WORDS == vocabulary_size(data.tokenizer)
    assert data.special_ids()["vocab_size"] == WORDS
    model = foreign_model("llama")
    model.lm_head = torch.nn.Linear(32, WORDS)
    torch.nn.init.constant_(model.lm_head.bias[WORDS - 1 :], 1e3)  # it always ends at once
    module = PretrainModule(model, NextToken())
    rows = data.encode_prompts(["jump 3"])
    assert data.decode_responses(module.decoder(data, 1, 1.0)(rows, torch.Generator())) == [""]
