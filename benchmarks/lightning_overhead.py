"""What the trainer costs: Lightning's training step against the same step in a loop written by hand.

python benchmarks/lightning_overhead.py --batch 128 --width 96 --layers 3
"""

import argparse
import copy
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console
from shapes import add_shape_options, build_base
from timing import (
    Row,
    Stopwatch,
    as_ratio,
    build_result,
    build_row,
    in_milliseconds,
    interleave,
    new_parser,
    prepare,
    quartiles,
    show,
    with_spread,
    write_json,
)
from torch.nn.utils import clip_grad_norm_
from transformers import get_cosine_schedule_with_warmup

from callbacks.ema import TrainableEMA
from callbacks.progress import StageProgress
from callbacks.table import report_console
from datamodules.oracle.datamodule import OracleDataModule
from lightning_modules.meanflow_distill import MeanFlowDistillModule

BARE = "loop by hand"
LIGHTNING = "Lightning"
LOGGING = "Lightning, logging"
AVERAGE = "Lightning, logging, weight average"
DEFAULT = "the default job without files"
CLIP = 1.0

READING = """
a step is everything from one batch to the next: reading it, loss, backward, clipping, AdamW, schedule. A ratio is the time
over the hand-written loop's in the same round, median [first, third quartile]; the next column is the same difference in
milliseconds a step, which does not shrink with the model. All rows take the same steps, which is checked. The rows add up:
the bare trainer; what `self.log` and a logger that keeps nothing cost; the weight average; the progress bar (drawn into
memory) and the learning rate monitor. Checkpoints, validation and the event file are left out.
"""


@dataclass
class Setting:
    """What a trainer is given beyond the module."""

    logs: bool = False
    callbacks: Callable[[], list[Callback]] = field(default=list)


class Clock(Callback):
    """Seconds from the end of step `first` to the end of step `last`, and the last step's loss."""

    def __init__(self, first: int, last: int, clock: str) -> None:
        self.first, self.last, self.clock = first, last, clock
        self.seconds = self.loss = float("nan")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if trainer.global_step == self.first:
            self.watch = Stopwatch(pl_module.device, self.clock)
        elif trainer.global_step == self.last:
            self.seconds, self.loss = self.watch.seconds(), outputs["loss"].item()


def drawn_in_memory() -> StageProgress:
    """The progress bar as a terminal would get it, wherever the output goes."""
    progress = StageProgress()
    progress.console = Console(file=io.StringIO(), force_terminal=True)
    return progress


SETTINGS = {
    LIGHTNING: Setting(),
    LOGGING: Setting(logs=True),
    AVERAGE: Setting(logs=True, callbacks=lambda: [TrainableEMA(0.995)]),
    DEFAULT: Setting(logs=True, callbacks=lambda: [TrainableEMA(0.995), drawn_in_memory(), LearningRateMonitor()]),
}


# -- the two ways of taking the same steps ---------------------------------------------------------------------------


def run_by_hand(
    module: MeanFlowDistillModule, data: OracleDataModule, args: argparse.Namespace, device: torch.device
) -> tuple[float, float]:
    """Seconds a step, and the last loss."""
    module.log = lambda *_, **__: None
    module.train()
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": module.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=module.lr, betas=(0.9, 0.98))
    steps = args.first + args.steps
    schedule = get_cosine_schedule_with_warmup(optimizer, min(module.warmup_steps, steps // 2), steps)
    for batch_idx, batch in zip(range(steps), data.train_dataloader(), strict=False):
        loss = module.training_step({name: column.to(device) for name, column in batch.items()}, batch_idx)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        module.student.soft_prompt.project_()
        schedule.step()
        if batch_idx + 1 == args.first:
            watch = Stopwatch(device, args.clock)
    return watch.seconds() / args.steps, loss.item()


def run_lightning(
    module: MeanFlowDistillModule,
    data: OracleDataModule,
    args: argparse.Namespace,
    device: torch.device,
    setting: Setting,
) -> tuple[float, float]:
    """Seconds a step, and the last loss."""
    if not setting.logs:
        module.log = lambda *_, **__: None
    callbacks = setting.callbacks()
    clock = Clock(args.first, args.first + args.steps, args.clock)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_steps=clock.last,
        max_epochs=-1,
        gradient_clip_val=CLIP,
        log_every_n_steps=20,
        callbacks=[*callbacks, clock],
        logger=DummyLogger() if setting.logs else False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, StageProgress) for callback in callbacks),
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return clock.seconds / args.steps, clock.loss


# -- from options to result ------------------------------------------------------------------------------------------


def measure_all(args: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict[str, float]]:
    """A row for each way, and the loss at which each arrived."""
    total = args.first + args.steps
    data = OracleDataModule(
        size=args.size, train_rows=total * args.batch, val_rows=1, test_rows=1, batch_size=args.batch, seed=args.seed
    )
    data.setup()
    ids = data.tokenizer
    length = data.prompt_length + data.response_length
    base = build_base(args, device, vocab_size=len(ids), length=length, mask_id=ids.mask_token_id)
    start = MeanFlowDistillModule(
        base, prompt_length=args.prefix, prompt_hidden_size=args.prompt_width, endpoint_share=0.25, seed=args.seed
    ).to(device)
    losses: dict[str, float] = {}

    def measure(name: str) -> float:
        module = copy.deepcopy(start)  # every turn takes the same steps from the same weights
        if name == BARE:
            seconds, losses[name] = run_by_hand(module, data, args, device)
        else:
            seconds, losses[name] = run_lightning(module, data, args, device, SETTINGS[name])
        return seconds

    names = (BARE, *SETTINGS)
    times = interleave(
        {name: lambda name=name: measure(name) for name in names}, repeats=args.repeats, warmup=args.warmup
    )
    for name in names:
        if abs(losses[name] - losses[BARE]) > 1e-4 * abs(losses[BARE]):
            raise SystemExit(
                f"{name} arrives at loss {losses[name]}, the loop by hand at {losses[BARE]}: not the same steps"
            )
    rows = []
    for name in names:
        more = [ours - bare for ours, bare in zip(times[name], times[BARE], strict=True)]
        rows.append(build_row(name, times, BARE, more_seconds=quartiles(more)))
    return rows, losses


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=10)
    parser.set_defaults(warmup=1)
    add_shape_options(parser)
    parser.add_argument("--batch", type=int, default=128, help="rows")
    parser.add_argument(
        "--size", choices=("tiny", "small", "large"), default="small", help="corpus; small has 20 columns"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps that count in a turn")
    parser.add_argument("--first", type=int, default=5, help="steps of a turn before them, which do not count")
    args = parser.parse_args(argv)
    if args.first < 1 or args.steps < 1:
        parser.error("--first and --steps have to be at least 1")
    device, console = prepare(args), report_console()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows, losses = measure_all(args, device)
    result = build_result("lightning_overhead", args, device, rows, READING, losses=losses)
    columns = {
        "training with": lambda row: row["name"],
        "ms a step": in_milliseconds,
        "ratio": as_ratio,
        "ms more a step": lambda row: with_spread({key: 1e3 * value for key, value in row["more_seconds"].items()}),
    }
    show(result, columns, console)
    write_json(result, args.json)


if __name__ == "__main__":
    main()
