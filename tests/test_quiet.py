"""A run through run.py shows no warning that its user cannot act on."""

import logging
import warnings

import pytest
from helpers.experiment import tiny_qwen
from helpers.foreign import foreign_model, foreign_tokenizer, save_foreign

from app import modes
from datamodules.tokenizer import build_tokenizer
from models.backbones.masked_from_causal import load_from_causal
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


def test_a_tokenizer_is_read_from_the_folder_of_a_model_of_ours_without_a_message(tmp_path, monkeypatch):
    folder = save_foreign(tmp_path / "causal", foreign_model("llama"), foreign_tokenizer())
    load_from_causal(folder, mask_token="<extra_260>").save_pretrained(tmp_path / "masked")
    foreign_tokenizer().save_pretrained(tmp_path / "masked")
    found = []
    logger = logging.getLogger("transformers.configuration_utils")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "callHandlers", found.append)
    build_tokenizer(str(tmp_path / "masked"), [], 0, tmp_path / "cache")
    assert any("leap_masked_from_causal" in record.getMessage() for record in found)
    found.clear()
    with quiet_libraries():
        build_tokenizer(str(tmp_path / "masked"), [], 0, tmp_path / "cache")
        logger.warning("something to act on")
    assert [record.getMessage() for record in found] == ["something to act on"]


def test_other_warnings_are_shown(shown):
    with quiet_libraries():
        warnings.warn("something to act on", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something to act on"]
