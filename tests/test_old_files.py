"""Files that the first version wrote are still read: checkpoints, students, exported models and records.

tests/fixtures/first_formats holds one small run of each kind: what it left, and the options that made it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.daily import daily
from safetensors.torch import load_file

from app import modes
from app.build import build
from app.trained import fill_from_checkpoint, load_model, load_planned
from models.backbones.llada import load_llada
from models.flow.student_files import load_student
from models.functional.weights import trainable_weights
from reporting.record import read_record

FIXTURES = Path(__file__).parent / "fixtures" / "first_formats"
RUNS = sorted(path.name for path in FIXTURES.iterdir())
STUDENTS = [name for name in RUNS if (FIXTURES / name / "student").is_dir()]


def overrides(name: str) -> list[str]:
    """The options of a run, and where the models that it needs lie."""
    found = json.loads((FIXTURES / name / "overrides.json").read_text())
    if (FIXTURES / name / "teacher").is_dir():
        found.append(f"teacher.path={FIXTURES / name / 'teacher'}")
    if (FIXTURES / name / "pair").is_dir():
        found += [f"pair.{part}.path={FIXTURES / name / 'pair' / part}" for part in ("theta", "target")]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_fills_its_module(configure, name):
    module, trainer, _ = build(configure(*overrides(name)))
    module.trainer = trainer
    checkpoint = torch.load(FIXTURES / name / "last.ckpt", weights_only=True)
    torch.save(checkpoint | {"callbacks": {}}, "plain.ckpt")  # without the averages of a callback
    fill_from_checkpoint(module, "plain.ckpt")
    held, kept = module.state_dict(), checkpoint["state_dict"]
    assert set(trainable_weights(module)) <= kept.keys()
    assert all(torch.equal(held[key], weight) for key, weight in kept.items())


@pytest.mark.parametrize("name", daily(RUNS, *RUNS[:3]))
def test_a_checkpoint_is_compared_and_gone_on_from(configure, name, capsys):
    """The whole of it: weights, optimiser, callbacks, the position in the data."""
    modes.run_mode(configure(*overrides(name), f"ckpt_path={FIXTURES / name / 'last.ckpt'}"))
    old, new = (read_record(path) for path in (FIXTURES / name / "record.json", Path("out/x/run/record.json")))
    # the two models alone took all columns then; they now stop at the end of a text
    passes = [
        [(row["method"], row["decoder"], None if "alone" in row["decoder"] else row["nfe"]) for row in record["rows"]]
        for record in (old, new)
    ]
    assert passes[0] == passes[1]


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_read(name):
    student = load_student(FIXTURES / name / "student", load_llada(FIXTURES / name / "teacher"))
    weights = load_file(FIXTURES / name / "student" / "student.safetensors")
    assert all(torch.equal(student.state_dict()[key], weight) for key, weight in weights.items())


def test_exported_models_are_read(tmp_path):
    plans = load_planned(FIXTURES / "plans" / "model")
    tables = load_file(FIXTURES / "plans" / "model" / "concepts.safetensors")
    held = list(plans.state_dict().values())
    assert all(any(torch.equal(weight, own) for own in held) for weight in tables.values())
    assert load_model(FIXTURES / "online" / "model").config.vocab_size > 0
    shutil.copytree(FIXTURES / "qstar" / "theta", tmp_path / "theta")
    adapter = tmp_path / "theta" / "adapter_config.json"
    described = json.loads(adapter.read_text()) | {
        "base_model_name_or_path": str(FIXTURES / "qstar" / "pair" / "theta")
    }
    adapter.write_text(json.dumps(described))
    assert load_model(tmp_path / "theta").peft_config


def test_records_are_rows_of_the_report(configure, tmp_path, capsys):
    for name in RUNS:
        (tmp_path / "out" / name).mkdir(parents=True)
        shutil.copy(FIXTURES / name / "record.json", tmp_path / "out" / name)
    modes.run_mode(configure("mode=report"))
    table = (tmp_path / "out" / "report" / "frontier.md").read_text()
    assert all(json.loads((FIXTURES / name / "record.json").read_text())["experiment"] in table for name in RUNS)
