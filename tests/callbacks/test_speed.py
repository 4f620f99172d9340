"""Tokens, texts and FLOPs a second by hand, on a clock that the test sets."""

from types import SimpleNamespace

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.trainer import quiet_trainer

import callbacks.speed
from callbacks.speed import Speed, peak_of
from lightning_modules.pretrain import PretrainModule
from models.functional.errors import UsageError
from models.objectives.next_token import NextToken

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def clock(monkeypatch):
    fake = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(callbacks.speed, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


class Logged(SimpleNamespace):
    """Stands in for a module on a CPU whose step takes 1e12 FLOP."""

    device = torch.device("cpu")

    def flops_of_step(self, batch) -> float:
        return 1e12

    def log(self, name, value, **_) -> None:
        self.found.append((name, value))


def batch(rows=4, tokens=6):
    mask = torch.zeros(rows, 5, dtype=torch.bool)
    mask.view(-1)[:tokens] = True
    return {"input_ids": torch.zeros(rows, 5), "response_mask": mask}


def run(clock, batches: int, ranks: int = 2, validation_after: int | None = None, **options) -> list[tuple[str, float]]:
    module, speed = Logged(found=[]), Speed(**options)
    trainer = SimpleNamespace(precision="32-true", world_size=ranks, log_every_n_steps=3)
    speed.on_train_start(trainer, module)
    for k in range(batches):
        speed.on_train_batch_start(trainer, module, batch(), k)
        clock.now += 2.0
        speed.on_train_batch_end(trainer, module, None, batch(), k)
        if k == validation_after:
            clock.now += 100.0
            speed.on_validation_end(trainer, module)
    return module.found


def test_rates_of_all_ranks_without_validation(clock):
    """Three batches of 4 texts and 6 tokens in 6 seconds, on two ranks; the fourth and fifth are not enough to say more."""
    expected = [("speed/tokens_per_s", 6.0), ("speed/samples_per_s", 4.0)]
    assert run(clock, 5) == expected
    assert run(clock, 5, validation_after=1) == expected
    assert run(clock, 6, validation_after=2) == expected * 2
    assert run(clock, 3, ranks=1) == [("speed/tokens_per_s", 3.0), ("speed/samples_per_s", 2.0)]


def test_mfu_is_the_share_of_the_peak_and_is_not_there_where_no_peak_is_known(clock):
    assert dict(run(clock, 3, peak_flops=2e12))["speed/mfu"] == pytest.approx(1e12 / 2.0 / 2e12)
    assert "speed/mfu" not in dict(run(clock, 3))


def test_peaks_are_those_of_the_kind_and_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H100)
    gpu = torch.device("cuda")
    assert peak_of(gpu, "bf16-mixed") == pytest.approx(989.5e12, rel=1e-3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Nobody's GPU")
    with pytest.warns(UserWarning, match='FLOPs not found for "Nobody\'s GPU"'):  # Lightning's
        assert peak_of(gpu, "bf16-mixed") is None
    assert peak_of(torch.device("cpu"), "bf16-mixed") is None
    with pytest.raises(UsageError, match=r"callbacks.speed.peak_flops=-1.0 must be above 0"):
        Speed(peak_flops=-1.0)


def test_a_real_training_logs_them(tiny_oracle):
    module = PretrainModule(tiny_causal(len(tiny_oracle.tokenizer)), NextToken(), warmup_steps=1)
    trainer = quiet_trainer(4, log_every_n_steps=2, callbacks=[Speed(peak_flops=1e12)])
    trainer.fit(module, tiny_oracle)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("speed/")}
    assert found["speed/tokens_per_s"] == pytest.approx(found["speed/samples_per_s"] * tiny_oracle.response_length)
    assert 0 < found["speed/mfu"] < 1
