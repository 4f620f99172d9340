"""Flags of the command line, such as -m and --cfg job, which stand beside the options. Reads no library."""

from difflib import get_close_matches
from itertools import chain, islice

from models.functional.errors import UsageError

MULTIRUN = ("-m", "--multirun")
TAKE_A_VALUE = ("-c", "--cfg", "-p", "--package")
CHECKED = (*MULTIRUN, "-r", "--run", "--resolve", *TAKE_A_VALUE)  # flags beside which options are checked
# those of Hydra, and run.py's own
FLAGS = (
    "help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion", "config-path",
    "config-name", "config-dir", "experimental-rerun", "info", "list",
)  # fmt: skip


def flags_and_options(arguments: list[str]) -> tuple[list[list[str]], list[str]]:
    """Each flag with the value that follows it, and the arguments that are none of these."""
    flags: list[list[str]] = []
    options: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in TAKE_A_VALUE:
            flags.append([argument, *islice(rest, 1)])
        elif argument.startswith("-"):
            flags.append([argument])
        else:
            options.append(argument)
    return flags, options


def flags_first(arguments: list[str]) -> list[str]:
    """Hydra reads no options behind a flag in the middle."""
    flags, options = flags_and_options(arguments)
    return [*chain(*flags), *options]


def is_sweep(arguments: list[str]) -> bool:
    return any(flag in arguments for flag in MULTIRUN)


def require_known_flags(arguments: list[str]) -> None:
    """Raise UsageError for what begins with a dash and is no flag, such as an option."""
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        is_long = argument.startswith("--")
        if argument.startswith("--list="):
            raise UsageError(f"{argument}: type --list alone")
        if not argument.startswith("-") or (is_long and name in FLAGS):
            continue
        if is_long and not equals:
            begun = [flag for flag in FLAGS if name and flag.startswith(name)]
            close = begun or get_close_matches(name, FLAGS, cutoff=0.7)
            option = f"options have no dashes; type {name or '<name>'}=<value>"
            raise UsageError(f"{argument} is no flag; {f'did you mean --{close[0]}?' if close else option}")
        if equals and (is_long or len(name) > 1):
            raise UsageError(f"{argument}: options have no dashes; type {name}={value}, or --help or --list")
