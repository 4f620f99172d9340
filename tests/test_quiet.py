"""A run through run.py shows no warning that its user cannot act on."""

import warnings

import pytest
from helpers.experiment import tiny_qwen

from app import modes
from reporting.console import quiet_libraries


@pytest.fixture
def shown():
    """The warnings that a Python process would show."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):  # Python's own
            warnings.simplefilter("ignore", hidden)
        yield seen


def test_an_adapted_model_is_trained_tested_asked_and_exported_without_a_warning(configure, tmp_path, capfd, shown):
    qwen = tiny_qwen(tmp_path / "qwen")
    short = ["experiment=next_token_qwen", f"model.path={qwen}", "model.lora_rank=2", "trainer.accelerator=cpu"]
    short += ["data=oracle", "data.size=tiny", "module.forwards=[1]", "trainer.val_check_interval=1"]
    short += ["data.train_rows=32", "data.test_rows=16", "data.batch_size=16"]
    runs = tmp_path / "out" / "next_token_qwen"
    capfd.readouterr()
    shown.clear()
    with quiet_libraries():
        modes.fit(configure(*short, "trainer.max_steps=1", f"paths.run_dir={runs}/first"))
        again = ["trainer.max_steps=2", "ckpt_path=last", f"paths.run_dir={runs}/second"]
        modes.fit(configure(*short, *again))
        modes.test(configure(*short, "mode=test", f"paths.run_dir={runs}/third"))
        modes.generate(configure(*short, "mode=generate", "prompt='who=anna'"))
        modes.export(configure(*short, "mode=export"))
    assert [str(warning.message) for warning in shown] == []
    assert "warn" not in "".join(capfd.readouterr()).lower()


def test_other_warnings_are_shown(shown):
    with quiet_libraries():
        warnings.warn("something to act on", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something to act on"]
