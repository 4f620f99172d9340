"""The average of the trainable weights against its recursion by hand, and that training never notices it."""

import pytest
import torch
from helpers.trainer import quiet_trainer
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from callbacks.ema import TrainableEMA
from datamodules.batch import TensorRows
from datamodules.loader import ResumableLoader


class Toy(LightningModule):
    """A frozen layer and one that trains, with momentum so that a lost optimiser state would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.frozen, self.head = nn.Linear(3, 3), nn.Linear(3, 1)
        self.frozen.requires_grad_(False)
        self.validated, self.tested = [], []

    def training_step(self, batch, batch_idx):
        return (self.head(self.frozen(batch["x"])) - batch["y"]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(weights(self))

    def test_step(self, batch, batch_idx):
        self.tested.append(weights(self))

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        draw = torch.Generator().manual_seed(2)
        rows = {"x": torch.randn(16, 3, generator=draw), "y": torch.randn(16, 1, generator=draw)}
        return ResumableLoader(TensorRows(rows), batch_size=2, shuffle=True)

    def val_dataloader(self):
        return ResumableLoader(TensorRows({"x": torch.zeros(1, 3)}), batch_size=1)

    test_dataloader = val_dataloader


def weights(module) -> torch.Tensor:
    """Everything that trains, as one vector."""
    return torch.cat([p.detach().flatten().clone() for p in module.parameters() if p.requires_grad])


def averaged(ema: TrainableEMA) -> torch.Tensor:
    return torch.cat([value.flatten().clone() for value in ema.average.values()])


class Raw(Callback):
    """Remembers the weights after every optimiser step; stands after the average in the list of callbacks."""

    def __init__(self) -> None:
        self.weights, self._seen = [], 0

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.weights.append(weights(pl_module))


def by_hand(start: torch.Tensor, steps: list[torch.Tensor], decay: float) -> torch.Tensor:
    average = start.double()
    for n, step in enumerate(steps):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * step.double()
    return average


def fit(max_steps: int, decay: float | None = 0.3, extra=(), **options):
    module, raw = Toy(), Raw()
    averages = [] if decay is None else [TrainableEMA(decay)]
    start = weights(module)
    quiet_trainer(max_steps, callbacks=[*averages, raw, *extra], **options).fit(module)
    return module, raw, averages[0] if averages else None, start


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_average_is_the_recursion_by_hand_and_is_in_place_after_fit(decay):
    """0.3 passes from the early rule (1 + n) / (10 + n) to the decay at the fourth step; 0.999 never leaves it."""
    module, raw, ema, start = fit(12, decay)
    assert len(raw.weights) == ema.steps == 12
    expected = by_hand(start, raw.weights, decay)
    torch.testing.assert_close(averaged(ema).double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(weights(module), averaged(ema))
    other = by_hand(start, raw.weights, 0.5)
    assert (other - expected).abs().max() > 1e-3  # another decay would have been seen
    assert decay == 0 or (weights(module) - raw.weights[-1]).abs().max() > 1e-3


def test_only_trainable_parameters_are_held_and_frozen_ones_stay():
    frozen = Toy().frozen.weight.detach().clone()
    module, _, ema, _ = fit(3)
    assert set(ema.average) == {"head.weight", "head.bias"}
    assert torch.equal(module.frozen.weight, frozen)
    held = {value.data_ptr() for value in ema.average.values()}
    assert not held & {p.data_ptr() for p in module.parameters()}


class AveragesAtValidation(Callback):
    def __init__(self, ema: TrainableEMA) -> None:
        self.ema, self.values = ema, []

    def on_validation_batch_end(self, *_) -> None:
        self.values.append(averaged(self.ema))


def test_validation_sees_the_average_and_training_goes_on_from_the_raw_weights():
    ema, raw, module = TrainableEMA(0.3), Raw(), Toy()
    seen = AveragesAtValidation(ema)
    quiet_trainer(12, callbacks=[ema, raw, seen], val_check_interval=2).fit(module)
    assert len(module.validated) == 6
    for step, (used, average) in enumerate(zip(module.validated, seen.values, strict=True)):
        assert torch.equal(used, average)
        assert not torch.equal(used, raw.weights[2 * step + 1])
    _, alone, _, _ = fit(12, decay=None)
    for ours, theirs in zip(raw.weights, alone.weights, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_only_optimiser_steps_count(accumulate):
    """8 batches an epoch: with 3 to a step, the last step of an epoch has only 2."""
    _, raw, ema, start = fit(7, accumulate_grad_batches=accumulate)
    assert ema.steps == len(raw.weights) == 7
    torch.testing.assert_close(averaged(ema).double(), by_hand(start, raw.weights, 0.3), atol=1e-6, rtol=1e-5)


def checkpoints(folder) -> dict:
    keep = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    return {"extra": [keep], "enable_checkpointing": True}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [3, 8])
def test_a_resumed_average_is_the_uninterrupted_one(tmp_path, accumulate, stop):
    module, _, ema, _ = fit(12, accumulate_grad_batches=accumulate, **checkpoints(tmp_path))
    again, resumed = Toy(), TrainableEMA(0.3)
    trainer = quiet_trainer(12, callbacks=[resumed], accumulate_grad_batches=accumulate)
    trainer.fit(again, ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True)
    assert resumed.steps == ema.steps == 12
    assert torch.equal(averaged(resumed), averaged(ema))
    assert torch.equal(weights(again), weights(module))


def test_a_checkpoint_holds_the_raw_weights_and_the_average_as_plain_tensors(tmp_path):
    _, raw, _, start = fit(5, **checkpoints(tmp_path))
    held = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    (state,) = (value for name, value in held["callbacks"].items() if "TrainableEMA" in name)
    assert state["steps"] == 5
    stored = torch.cat([held["state_dict"][name].flatten() for name in ("head.weight", "head.bias")])
    assert torch.equal(stored, raw.weights[-1])
    average = torch.cat([state["average"][name].flatten() for name in ("head.weight", "head.bias")])
    torch.testing.assert_close(average.double(), by_hand(start, raw.weights, 0.3), atol=1e-6, rtol=1e-5)


def test_testing_from_a_checkpoint_scores_the_average_as_the_run_itself_did(tmp_path):
    """A run ends with the average in the module and is scored with it; its checkpoint must give the same figures."""
    module, raw, _, _ = fit(5, **checkpoints(tmp_path))
    quiet_trainer(1).test(module, verbose=False)
    later = Toy()
    trainer = quiet_trainer(1, callbacks=[TrainableEMA(0.3)])
    trainer.test(later, ckpt_path=tmp_path / "step=5.ckpt", weights_only=True, verbose=False)
    assert not torch.equal(module.tested[0], raw.weights[-1])
    assert torch.equal(later.tested[0], module.tested[0])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_outside_its_range_is_named(decay):
    with pytest.raises(ValueError, match=f"decay={decay} must be at least 0 and less than 1"):
        TrainableEMA(decay)
