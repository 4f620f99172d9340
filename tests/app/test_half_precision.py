"""A run in half precision on a processor that is slow at it says so, once, with what to type."""

import pytest
import torch
from lightning import LightningModule, Trainer
from omegaconf import OmegaConf
from rich.console import Console

from app import half_precision


class OneMatrix(LightningModule):
    def __init__(self, dtype):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4, dtype=dtype)


def said(monkeypatch, capsys, *, slowdown=60.0, weights=torch.float32, precision="32-true", **cfg):
    monkeypatch.setattr(half_precision, "product_slowdown", lambda dtype: slowdown)
    trainer = Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    console = Console(width=400, force_terminal=False)
    capsys.readouterr()
    half_precision.say_if_half_is_slow(OmegaConf.create(cfg), OneMatrix(weights), trainer, console)
    return capsys.readouterr().out


def test_what_to_type_names_the_options_of_the_run(monkeypatch, capsys):
    half = {"weights": torch.bfloat16, "model": {"dtype": "auto"}}
    assert said(monkeypatch, capsys, **half) == (
        "this processor takes 60 times as long for products in bfloat16 as in float32; "
        "to compute in float32 type model.dtype=float32\n"
    )
    assert said(monkeypatch, capsys, precision="bf16-mixed", **half).endswith(
        "type model.dtype=float32 trainer.precision=32-true\n"
    )
    pair = {"theta": {"dtype": "bfloat16"}, "target": {"dtype": "float32"}}
    assert said(monkeypatch, capsys, weights=torch.float16, pair=pair).endswith("type pair.theta.dtype=float32\n")
    assert said(monkeypatch, capsys, weights=torch.float16).endswith("products in float16 as in float32\n")


@pytest.mark.parametrize("more", [{"slowdown": 0.6, "weights": torch.bfloat16}, {"slowdown": 60.0}])
def test_nothing_is_said_where_nothing_is_lost(monkeypatch, capsys, more):
    assert said(monkeypatch, capsys, model={"dtype": "float32"}, **more) == ""


def test_the_slowdown_is_a_ratio_of_times(monkeypatch):
    seconds = {torch.float32: 2.0, torch.bfloat16: 6.0}
    monkeypatch.setattr(half_precision, "_seconds", lambda dtype, rows, width: seconds[dtype])
    assert half_precision.product_slowdown(torch.bfloat16) == 3.0
    monkeypatch.undo()
    assert half_precision.product_slowdown(torch.bfloat16, rows=8, width=8) > 0
