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

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console
from shapes import add_shape_options, build_base
from timing import (
    Row,
    as_ratio,
    build_result,
    build_row,
    in_milliseconds,
    new_parser,
    prepare,
    quartiles,
    show,
    with_spread,
    write_json,
)
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup
from turns import Pause, PauseAtTheEnd, take_turns

from callbacks.ema import TrainableEMA
from callbacks.progress import StageProgress
from datamodules.oracle.datamodule import OracleDataModule
from lightning_modules.logit_flow import LogitFlowModule
from reporting.console import report_console

BARE = "loop by hand"
LIGHTNING = "Lightning"
LOGGING = "Lightning, logging"
AVERAGE = "Lightning, logging, weight average"
DEFAULT = "the default job without files"
CLIP = 1.0

READING = """
a step is everything from one batch to the next: reading it, loss, backward, clipping, AdamW, schedule. A ratio is the time
over the hand-written loop's in the same round, a round being one step of every loop, median [first, third quartile]; the
next column is the same difference in milliseconds, which does not shrink when the model grows. Every loop takes the same
steps, which is checked. Down the table are added: the bare trainer; `self.log` and a logger that keeps nothing; the weight
average; progress in lines, as in a file, and the learning rate monitor. Checkpoints, validation and the event file are left
out.
"""


@dataclass
class Setting:
    """What a trainer is given beyond the module."""

    logs: bool = False
    callbacks: Callable[[], list[Callback]] = field(default=list)


def silent_progress() -> StageProgress:
    progress = StageProgress()
    progress.console = Console(file=io.StringIO())
    return progress


SETTINGS = {
    LIGHTNING: Setting(),
    LOGGING: Setting(logs=True),
    AVERAGE: Setting(logs=True, callbacks=lambda: [TrainableEMA(0.995)]),
    DEFAULT: Setting(logs=True, callbacks=lambda: [TrainableEMA(0.995), silent_progress(), LearningRateMonitor()]),
}


# -- the same steps, by Lightning and by hand ---------------------------------------------------------------------------


def train_by_hand(module: LogitFlowModule, loader: DataLoader, steps: int, device: torch.device, pause: Pause) -> None:
    module.log = lambda *_, **__: None
    module.train()
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": module.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=module.lr, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, min(module.warmup_steps, steps // 2), steps)
    for batch_idx, batch in zip(range(steps), loader, strict=False):
        loss = module.training_step({name: column.to(device) for name, column in batch.items()}, batch_idx)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        module.student.soft_prompt.project_weights()
        schedule.step()
        pause(loss)


def train_with_lightning(
    module: LogitFlowModule,
    loader: DataLoader,
    steps: int,
    device: torch.device,
    pause: Pause,
    setting: Setting,
) -> None:
    if not setting.logs:
        module.log = lambda *_, **__: None
    callbacks = setting.callbacks()
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=CLIP,
        log_every_n_steps=20,
        callbacks=[*callbacks, PauseAtTheEnd(pause)],
        logger=DummyLogger() if setting.logs else False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, StageProgress) for callback in callbacks),
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader)


# -- from options to result ------------------------------------------------------------------------------------------


def measure_all(args: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict[str, float]]:
    """A row for each of the two, with its last loss."""
    steps = args.warmup + args.repeats
    data = OracleDataModule(
        size=args.size, train_rows=steps * args.batch, val_rows=1, test_rows=1, batch_size=args.batch, seed=args.seed
    )
    data.setup()
    ids = data.tokenizer
    length = data.prompt_length + data.response_length
    base = build_base(args, device, vocab_size=len(ids), length=length, mask_id=ids.mask_token_id)
    start = LogitFlowModule(
        base, prompt_length=args.prefix, prompt_hidden_size=args.prompt_width, endpoint_share=0.25, seed=args.seed
    ).to(device)

    def loop(name: str) -> Callable[[Pause], None]:
        common = (copy.deepcopy(start), data.train_dataloader(), steps, device)
        if name == BARE:
            return lambda pause: train_by_hand(*common, pause)
        return lambda pause: train_with_lightning(*common, pause, SETTINGS[name])

    loops = {name: loop(name) for name in (BARE, *SETTINGS)}
    times, seen = take_turns(loops, device, args.clock, repeats=args.repeats, warmup=args.warmup)
    losses = {name: own[-1] for name, own in seen.items()}
    for name, loss in losses.items():
        if abs(loss - losses[BARE]) > 1e-4 * abs(losses[BARE]):
            raise SystemExit(f"{name} arrives at loss {loss}, the loop by hand at {losses[BARE]}: not the same steps")
    rows = []
    for name in loops:
        more = [ours - bare for ours, bare in zip(times[name], times[BARE], strict=True)]
        rows.append(build_row(name, times, BARE, more_seconds=quartiles(more)))
    return rows, losses


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=40)
    add_shape_options(parser)
    parser.add_argument("--batch", type=int, default=128, help="rows")
    parser.add_argument(
        "--size", choices=("tiny", "small", "large"), default="small", help="corpus; small has 20 columns"
    )
    args = parser.parse_args(argv)
    if args.warmup < 1:
        parser.error("--warmup has to be at least 1: the first step sets the trainer up")
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
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
