"""What a stage prints where the output goes to a file: about ten lines with the rate and the time left."""

import io
import re
from types import SimpleNamespace

import pytest
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from torch import nn, ones
from torch.optim import SGD
from torch.utils.data import DataLoader

import callbacks.progress
from callbacks.progress import StageProgress

LINE = re.compile(r"(\w[\w ]*): (\d+)/(\d+), ([\d.]+)(?:/s| s each), (\d+:\d\d) gone, (\d+:\d\d) left")


@pytest.fixture
def clock(monkeypatch):
    """The clock that progress reads: `clock.now` is set by the test."""
    fake = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(callbacks.progress, "time", SimpleNamespace(monotonic=lambda: fake.now))
    monkeypatch.setattr(ProgressBar, "get_metrics", lambda *_: {"train/loss": 1.25, "v_num": "run"})
    return fake


def bar(**console) -> tuple[StageProgress, io.StringIO]:
    out, progress = io.StringIO(), StageProgress("teacher")
    progress.console = Console(file=out, width=120, **console)
    return progress, out


def train(progress: StageProgress, clock, steps: int, start: int = 0, seconds: float = 2.0, batches: int = 1) -> None:
    """A stand-in for a trainer: `seconds` for each optimiser step of `batches` batches."""
    trainer = SimpleNamespace(max_steps=steps, global_step=start)
    progress.on_train_start(trainer, None)
    for step in range(start + 1, steps + 1):
        for batch in range(batches):
            clock.now += seconds / batches
            trainer.global_step = step if batch == batches - 1 else step - 1
            progress.on_train_batch_end(trainer, None, None, None, 0)
    progress.on_train_end(trainer, None)


def test_ten_lines_with_rate_and_time_left(clock):
    progress, out = bar()
    train(progress, clock, 250)
    lines = out.getvalue().splitlines()
    found = [LINE.match(line).groups() for line in lines]
    assert [int(done) for _, done, *_ in found] == list(range(25, 251, 25))
    assert found[0] == ("teacher", "25", "250", "2.0", "0:50", "7:30")
    assert found[-1] == ("teacher", "250", "250", "2.0", "8:20", "0:00")
    assert all("train/loss 1.250" in line and "v_num" not in line for line in lines)


@pytest.mark.parametrize("steps", [1, 3, 10, 11, 99])
def test_a_short_stage_prints_at_most_ten_lines_and_always_its_last(clock, steps):
    progress, out = bar()
    train(progress, clock, steps)
    done = [int(LINE.match(line).group(2)) for line in out.getvalue().splitlines()]
    assert done[-1] == steps
    assert len(done) == min(steps, 10)
    assert done == sorted(set(done))


def test_a_long_stage_says_so_after_its_first_steps(clock):
    progress, out = bar()
    train(progress, clock, 400)
    found = [LINE.match(line).groups() for line in out.getvalue().splitlines()]
    assert found[0] == ("teacher", "2", "400", "2.0", "0:04", "13:16")
    assert [int(done) for _, done, *_ in found[1:]] == list(range(40, 401, 40))
    progress, out = bar()
    train(progress, clock, 100, start=10, seconds=60.0)
    assert LINE.match(out.getvalue()).groups() == ("teacher", "12", "100", "60.0", "2:00", "88:00")


def test_a_rate_is_in_steps_a_second_or_in_seconds(clock):
    progress, out = bar()
    train(progress, clock, 10, seconds=0.25)
    assert "4.0/s" in out.getvalue()
    progress, out = bar()
    train(progress, clock, 10, seconds=28.0)
    assert "28.0 s each" in out.getvalue()


def test_a_resumed_stage_goes_on_at_its_count_and_its_rate_is_that_of_the_new_steps(clock):
    progress, out = bar()
    train(progress, clock, 100, start=65)
    found = [LINE.match(line).groups() for line in out.getvalue().splitlines()]
    assert [int(done) for _, done, *_ in found] == [70, 80, 90, 100]
    assert found[0] == ("teacher", "70", "100", "2.0", "0:10", "1:00")  # 70 steps in 10 seconds would be 7 a second


def test_batches_that_move_no_weight_do_not_count(clock):
    progress, out = bar()
    train(progress, clock, 20, batches=4)
    found = [LINE.match(line).groups() for line in out.getvalue().splitlines()]
    assert [int(done) for _, done, *_ in found] == list(range(2, 21, 2))
    assert {rate for _, _, _, rate, *_ in found} == {"2.0"}


def test_no_time_at_all_and_no_batches_at_all_divide_by_nothing(clock):
    progress, out = bar()
    train(progress, clock, 10, seconds=0.0)
    assert len(out.getvalue().splitlines()) == 10
    progress, out = bar()
    train(progress, clock, 0)
    progress.on_test_epoch_start(SimpleNamespace(num_test_batches=[0]), None)
    progress.on_test_epoch_end(None, None)
    assert out.getvalue() == ""


def test_testing_counts_batches_of_all_loaders(clock):
    progress, out = bar()
    trainer = SimpleNamespace(num_test_batches=[3, 2])
    progress.on_test_epoch_start(trainer, None)
    for _ in range(5):
        clock.now += 4.0
        progress.on_test_batch_end(trainer, None, None, None, 0)
    progress.on_test_epoch_end(trainer, None)
    first, *lines, last = out.getvalue().splitlines()
    assert first == "comparing decoders: 0/5 batches"  # before the first batch, which may take long
    assert last == "scoring the texts and drawing figures"
    found = [LINE.match(line).groups() for line in lines]
    assert [(done, total) for _, done, total, *_ in found] == [(str(n), "5") for n in range(1, 6)]
    assert found[1][3:] == ("4.0", "0:08", "0:12")


def test_a_disabled_bar_says_nothing(clock):
    """Every rank but the first is disabled by the trainer."""
    progress, out = bar()
    progress.disable()
    train(progress, clock, 20)
    progress.on_test_epoch_start(SimpleNamespace(num_test_batches=[3]), None)
    progress.on_test_epoch_end(None, None)
    assert out.getvalue() == ""
    progress.enable()
    train(progress, clock, 20)
    assert out.getvalue() != ""


@pytest.mark.parametrize("ending", ["on_train_end", "on_exception"])
def test_a_terminal_gets_one_bar_that_is_closed_at_the_end(clock, ending):
    progress, out = bar(force_terminal=True)
    trainer = SimpleNamespace(max_steps=10, global_step=0)
    progress.on_train_start(trainer, None)
    trainer.global_step = 4
    clock.now += 2.0
    progress.on_train_batch_end(trainer, None, None, None, 0)
    getattr(progress, ending)(trainer, None, *([KeyboardInterrupt()] if ending == "on_exception" else []))
    printed = out.getvalue()
    assert "4/10" in printed
    assert "2.0/s" in printed
    assert not LINE.search(printed)
    assert printed.endswith("\x1b[?25h")  # the cursor is shown again


class Toy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        return DataLoader(ones(30, 1), batch_size=1)


def test_a_real_trainer_prints_the_same_lines(capsys):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=20,
        callbacks=[StageProgress("teacher")],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Toy())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher:")]
    assert [int(LINE.match(line).group(2)) for line in lines] == list(range(2, 21, 2))
    assert all(re.search(r"train/loss \d\.\d{3}", line) for line in lines)
