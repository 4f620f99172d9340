"""The console of a run: where it prints, which library messages are hidden, and sentences for errors."""

import errno
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, UnsupportedInterpolationType
from rich.console import Console
from rich.markup import escape

from models.functional.errors import UsageError
from reporting.command import command, option, shell

# torch's on a CPU and on a GPU, numpy's
OUT_OF_MEMORY = re.compile(r"(?:ried to allocate|Unable to allocate) ([\d.]+) (\w+)")
DEAD_WORKER = re.compile(r"DataLoader worker.*(exited unexpectedly|is killed by signal)")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def report_console() -> Console:
    """The terminal, or 140 columns where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def sentence_for(error: BaseException) -> str | None:
    """A sentence for an error that the user can correct; None for a defect of this code, which is shown with its traceback."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UsageError):
            return str(cause)
        if isinstance(cause, MisconfigurationException):
            if "No supported gpu backend" in str(cause):
                return "PyTorch sees no GPU here; type trainer=cpu, or leave trainer= out to take what there is"
            return f"{cause}"
        if type(cause).__name__ == "MissingMandatoryValue":  # OmegaConf's; only run.py knows configurations
            name = getattr(cause, "full_key", None)
            return f"{name} has no value; type {name}=<value>"
        if isinstance(cause, InterpolationKeyError | InterpolationResolutionError | UnsupportedInterpolationType):
            name, reason = cause.full_key or "an option", str(cause).splitlines()[0]
            return f"{name}: {reason}; ${{...}} stands for the value of another option, \\${{ for these characters"
        if isinstance(cause, TypeError) and "unexpected keyword argument" in str(cause):
            return f"{cause}; see the options with --cfg job"
        if isinstance(cause, RuntimeError) and DEAD_WORKER.search(str(cause)):
            return (
                "a process that loads data has died, often because memory ran out; type data.num_workers=0, or fewer workers, "
                "and ckpt_path=last to go on from the last checkpoint"
            )
        if (asked := _asked_memory(cause)) is not None:
            return (
                f"memory ran out{asked}; type a smaller data.batch_size (with trainer.accumulate_grad_batches a step has as "
                "many rows), fewer rows or smaller sizes of the model"
            )
        if isinstance(cause, OSError) and cause.errno in FULL:
            return (
                f"no space is left to write{f' {cause.filename}' if cause.filename else ''} ({cause.strerror}); free some, "
                "then type the same command with ckpt_path=last: earlier checkpoints are complete"
            )
        if isinstance(cause, OSError) and cause.errno in FORBIDDEN and cause.filename:
            return (
                f"{cause.filename}: {cause.strerror}; change whose it is or its permissions, or type another folder with "
                "paths.output_dir=, hydra.run.dir= or paths.cache_dir="
            )
        if type(cause).__name__ == "InstantiationException" and "target 'lightning." in str(cause):
            option = str(cause).rsplit("full_key: ", 1)[-1]
            inner = cause.__cause__  # Lightning's message about its own options
            if isinstance(inner, ValueError | TypeError | ImportError) and "unexpected keyword" not in str(inner):
                return f"{option}: {inner}"
        cause = cause.__cause__ or cause.__context__
    return None


def _asked_memory(error: BaseException) -> str | None:
    """Of an error about too little memory, what was asked for, where it says so; None for any other error."""
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    found = OUT_OF_MEMORY.search(str(error))
    if found is None:
        return "" if isinstance(error, MemoryError) else None
    size, unit = found.groups()
    asked = f"{int(size) / 2**30:,.1f} GiB" if unit == "bytes" else f"{size} {unit}"
    return f" ({asked} were asked for at once)"


def print_error(sentence: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(sentence)}", highlight=False, soft_wrap=True)


def print_answers(console: Console, prompts: list[str], responses: list[str], plans: list[str] | None = None) -> None:
    """One line for each prompt; a prompt that is empty is left out. plans: what each response was written from."""
    for k, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        head = f"[dim]{escape(prompt)}[/] → " if prompt else ""
        console.print(f"{head}{escape(response)}{escape(in_brackets(plans[k])) if plans else ''}", soft_wrap=True)


def in_brackets(plan: str) -> str:
    """A plan as it stands behind its text."""
    return f"  ({plan})"


def from_here(path: Path) -> Path:
    """The path as one types it in the current folder, where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def say_where_things_are(
    console: Console, folder: Path, typed: list[str], teacher: str | None, example_prompt: str | None
) -> None:
    """What a run left in its folder and what to type next.

    typed: the options that name its model again; without any, only the files are listed. teacher: the student's.
    """
    folder = from_here(folder)
    names = ("record.json", "frontier.png", "tpf.png", "alpha.png")
    written = [f"{folder}/{name}" for name in names if (folder / name).exists()]
    # a shortened comparison leaves none
    lines = {"record and figure": ", ".join(written)} if written else {}
    lines["dashboard"] = f"tensorboard --logdir {shell(str(folder))}"
    if teacher is not None:
        lines["student"] = f"{folder}/student (its teacher: {teacher})"
    elif (folder / "model").is_dir():
        lines["model"] = f"{folder}/model"
    if typed:
        lines["generate"] = command(*typed, "mode=generate", option("prompt", example_prompt or ""))
        lines["export"] = command(*typed, "mode=export")
        lines["compare runs"] = command("mode=report")
    console.print()
    for what, where in lines.items():
        console.print(f"{what + ':':18} {where}", highlight=False, markup=False, soft_wrap=True)


def _names_no_unknown_type(record: logging.LogRecord) -> bool:
    """False for what transformers says of the type of a folder from which a tokenizer alone is read."""
    return not record.getMessage().startswith("You are using a model of type")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back library messages that no user of a run can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("transformers.configuration_utils").addFilter(_names_no_unknown_type)
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing.*"
        )  # peft asks transformers by an old name
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")
        warnings.filterwarnings("ignore", message=".*Sparse invariant checks.*")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
        warnings.filterwarnings(
            "ignore", message="The dirpath has changed"
        )  # a run that goes on in a folder of its own
        yield
