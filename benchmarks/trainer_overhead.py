"""What the trainer costs each method: its experiment as it is started, against a hand-written loop of the same steps.

python benchmarks/trainer_overhead.py --threads 1 --clock cpu --device cpu
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from configured import configured
from lightning import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from rich.console import Console
from timing import (
    as_ratio,
    build_result,
    build_row,
    in_milliseconds,
    new_parser,
    prepare,
    show,
    write_json,
)
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from turns import Pause, PauseAtTheEnd, take_turns

from app.build import trainer_of, untrained
from callbacks.progress import StageProgress
from reporting.console import quiet_libraries, report_console

COMPARED = 20  # steps whose losses have to agree; rounding grows from step to step after that
# name -> experiment and options; no option changes what a step does, or how often anything is looked at
METHODS = {
    "next token": ["objectives"],
    "masked diffusion": ["objectives", "module/objective=masked_diffusion"],
    "noisy-mask flow": ["meanflow_llada"],
    "logit flow": ["meanflow_llada", "module=logit_flow"],
    "step halving": ["meanflow_llada", "module=step_halving"],
    "planner and executor": ["concept_oracle"],
    "online concepts": ["concept_online_oracle"],
    "θ toward q*": ["qstar_oracle", "trainer.max_steps=500"],
}
READING = """
one process, in which the two loops take turns step by step. By hand: the batch, training_step, backward, clipping, the
optimiser with what the method does after it, the schedule, validation_step where the experiment validates; nothing is
logged. The experiment: the same with Lightning, its logger and files, checkpoints, progress, averages, and every monitor at
its own cadence. *a step*: the ratio within a round, median [first, third quartile]; *all*: of the sums over all rounds, with
validation, monitors and checkpoints in both; *monitors*: seconds a hundred steps that the rounds with validation take longer
than by hand. The losses of the first steps are the same for both, which is checked; later on rounding may grow apart.
"""


class Finished(Exception):
    """Enough steps have been taken."""


def ending(pause: Pause, steps: int) -> Pause:
    """The pause after a step, which ends the training after so many."""
    taken = 0

    def at_the_end(loss: Tensor) -> None:
        nonlocal taken
        taken += 1
        pause(loss)
        if taken == steps:
            raise Finished

    return at_the_end


class ByHand(Callback):
    """Takes over where a training would begin, with the module, the optimiser and the loaders as Lightning has set them up."""

    def __init__(self, pause: Pause) -> None:
        self.pause = pause

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log = pl_module.log_dict = lambda *_, **__: None
        pl_module.train()
        loop, epoch = trainer.fit_loop, 0
        while True:
            loop.epoch_progress.current.completed = epoch
            trainer.train_dataloader.set_epoch(epoch)
            for batch_idx, batch in enumerate(trainer.train_dataloader):
                loss = _step(trainer, pl_module, batch, batch_idx)
                loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed += 1
                self.pause(loss)
                if trainer.global_step % trainer.val_check_interval == 0:
                    _validate(trainer, pl_module)
            epoch += 1


def _step(trainer: Trainer, module: LightningModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
    optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    batch = {name: column.to(module.device) for name, column in batch.items()}
    module.on_train_batch_start(batch, batch_idx)

    def closure() -> Tensor:
        loss = module.training_step(batch, batch_idx)
        optimizer.zero_grad()
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        clip_grad_norm_(module.parameters(), trainer.gradient_clip_val)
        return loss

    losses = []
    module.optimizer_step(trainer.current_epoch, batch_idx, optimizer, lambda: losses.append(closure()) or losses[-1])
    schedule.step()
    module.on_train_batch_end(losses[-1], batch, batch_idx)
    return losses[-1].detach()


@torch.no_grad()
def _validate(trainer: Trainer, module: LightningModule) -> None:
    module.eval()
    module.on_validation_epoch_start()
    for batch_idx, batch in enumerate(trainer.datamodule.val_dataloader()):
        module.validation_step({name: column.to(module.device) for name, column in batch.items()}, batch_idx)
    module.on_validation_epoch_end()
    module.train()


# -- from options to result ------------------------------------------------------------------------------------------


def of_method(method: str, folder: Path, more: list[str]) -> DictConfig:
    experiment, *options = METHODS[method]
    return configured([f"experiment={experiment}", *options, f"paths.cache_dir={folder}/cache", *more], folder)


def loop(cfg: DictConfig, steps: int, by_hand: bool) -> Callable[[Pause], None]:
    """The training of a configuration, on models that nobody has trained."""

    def train(pause: Pause) -> None:
        seed_everything(cfg.seed, verbose=False)
        module, datamodule = untrained(cfg)
        trainer = trainer_of(cfg)
        if by_hand:
            trainer.callbacks, trainer.loggers = [ByHand(ending(pause, steps))], []
        else:
            for callback in trainer.callbacks:
                if isinstance(callback, StageProgress):
                    callback.console = Console(file=open(f"{cfg.paths.output_dir}/progress.txt", "w"))  # noqa: SIM115
            trainer.callbacks.append(PauseAtTheEnd(ending(pause, steps)))
        try:
            trainer.fit(module, datamodule)
        except Finished:
            return

    return train


def measure(method: str, args: argparse.Namespace, device: torch.device, more: list[str]) -> list[dict[str, Any]]:
    """A row for each of the two loops."""
    with tempfile.TemporaryDirectory() as folder:
        configurations = {name: of_method(method, Path(folder, str(k)), more) for k, name in enumerate(LOOPS)}
        for cfg in configurations.values():
            Path(cfg.paths.output_dir).mkdir()
        steps = args.warmup + args.repeats
        loops = {name: loop(cfg, steps, name == LOOPS[0]) for name, cfg in configurations.items()}
        times, losses = take_turns(loops, device, args.clock, repeats=args.repeats, warmup=args.warmup)
    for hand, ours in zip(*(losses[name][:COMPARED] for name in LOOPS), strict=True):
        if abs(hand - ours) > 1e-4 * abs(hand):
            raise SystemExit(
                f"{method}: the experiment comes to loss {ours}, the loop by hand to {hand}: not the same steps"
            )
    rows = []
    for name in LOOPS:
        row = build_row(name, times, LOOPS[0]) | {"name": f"{method}, {name}"}
        row["all"] = sum(times[name]) / sum(times[LOOPS[0]])
        median = row["ratio"]["median"]
        beyond = sum(o - median * h for o, h in zip(times[name], times[LOOPS[0]], strict=True))
        row["monitors"] = 100 * beyond / args.repeats
        rows.append(row)
    return rows


LOOPS = ("by hand", "the experiment")


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=250)  # monitors look every 200 or 250 steps
    parser.set_defaults(warmup=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--options", nargs="*", default=[], help="of every experiment, such as model.hidden_size=16")
    args = parser.parse_args(argv)
    if args.warmup < 1:
        parser.error("--warmup has to be at least 1: the first step sets the trainer up")
    device, console = prepare(args), report_console()
    more = [f"trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}", *args.options]
    rows = []
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        for method in args.methods:
            rows += measure(method, args, device, more)
    result = build_result("trainer_overhead", args, device, rows, READING)
    columns = {
        "training": lambda row: row["name"],
        "ms a step": in_milliseconds,
        "a step": as_ratio,
        "all": lambda row: f"{row['all']:.3f}",
        "monitors, s/100": lambda row: f"{row['monitors']:.3f}",
    }
    show(result, columns, console)
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
