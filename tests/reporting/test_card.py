"""The model card of an exported folder: its numbers are the record's, and its code reads the folder back."""

import json
import re
from pathlib import Path

import pytest
from helpers.daily import daily
from helpers.experiment import FLOWS, TINY, tiny_qwen

from app import modes
from reporting.table import markdown_table, split_rows

SHORT = [
    "data.size=tiny", "data.train_rows=64", "data.test_rows=16", "data.batch_size=16", "trainer.max_steps=2", "logger=none",
    "trainer.accelerator=cpu",
]  # fmt: skip
SMALL = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16"]
OBJECTIVE = ["experiment=objectives", *SHORT, *SMALL, "module.forwards=[1]", "callbacks.probe=null"]
KINDS = {
    "causal": ("transformers", [*OBJECTIVE, "example_prompt='who=anna'"]),
    "filler": ("leap", [*OBJECTIVE, "module/objective=masked_diffusion"]),
    "denoiser": ("leap", [*OBJECTIVE, "module/objective=continuous_diffusion"]),
    "planner": ("leap", ["experiment=concept_oracle", *SHORT, *SMALL]),
    "online": (
        "leap",
        ["experiment=concept_online_oracle", *SHORT, *SMALL, "model.num_hidden_layers=3", "module.codes=8"],
    ),
    "flow": ("leap", [*TINY, *FLOWS["noisy_mask_flow"]]),
    "one step": ("leap", [*TINY, "module=logit_flow"]),
}


def read_card(folder: Path, monkeypatch, capsys) -> tuple[str, str]:
    """The card, and what its code prints."""
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    return card, capsys.readouterr().out


def export(configure, tmp_path, options: list[str]) -> tuple[Path, Path]:
    """A run and the folder that mode=export makes of its checkpoint."""
    name = configure(*options).name
    run, again = (tmp_path / "out" / name / place for place in ("first", "second"))
    modes.fit(configure(*options, f"paths.run_dir={run}"))
    modes.export(configure(*options, "mode=export", "licence=Apache-2.0", f"paths.run_dir={again}"))
    return run, again / "model"


@pytest.mark.parametrize("kind", daily(KINDS, "causal", "flow"))
def test_the_card_has_the_records_numbers_and_its_code_reads_the_folder(configure, tmp_path, monkeypatch, capsys, kind):
    library, options = KINDS[kind]
    run, folder = export(configure, tmp_path, options)
    assert list(folder.rglob("*.safetensors"))
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    card, printed = read_card(folder, monkeypatch, capsys)
    record = json.loads((run / "record.json").read_text())
    assert card.startswith(f"---\nlicense: apache-2.0\nlibrary_name: {library}\n")
    for part in split_rows(record):
        assert markdown_table(part) in card
    for value in (record["commit"], record["data"]["name"], f"| seed | {record['seed']} |"):
        assert value in card
    assert re.search(r"^[\d,]+ parameters$", printed, re.MULTILINE)
    assert ("who=anna" in printed) == (kind == "causal")


@pytest.mark.slow
def test_an_adapter_is_peft_s_and_names_its_base(configure, tmp_path, monkeypatch, capsys):
    base = tiny_qwen(tmp_path / "qwen")
    options = [
        "experiment=next_token_qwen",
        f"model.path={base}",
        "model.lora_rank=2",
        "data=oracle",
    ]
    run, folder = export(configure, tmp_path, [*options, *SHORT, "module.forwards=[1]"])
    card, printed = read_card(folder, monkeypatch, capsys)
    assert f'library_name: peft\ntags: [leap]\nbase_model: "{base}"' in card
    assert "AutoPeftModelForCausalLM.from_pretrained(folder)" in card
    assert "parameters" in printed
    assert (run / "model_merged" / "README.md").is_file()  # a training leaves cards too
    assert "licence | not stated" in (run / "model" / "README.md").read_text()


def test_the_command_stands_in_the_card_and_a_run_without_a_record_says_so(configure, tmp_path):
    run, folder = export(configure, tmp_path, KINDS["causal"][1])
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text("- experiment=objectives\n- example_prompt='who=anna'\n")
    (run / "record.json").unlink()
    modes.export(configure(*KINDS["causal"][1], "mode=export", f"paths.run_dir={folder.parent}"))
    card = (folder / "README.md").read_text()
    assert """| command | `python run.py experiment=objectives 'example_prompt='"'"'who=anna'"'"''` |""" in card
    assert "Not measured yet" in card
