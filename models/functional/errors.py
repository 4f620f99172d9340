"""The one exception that reaches a user as a sentence instead of a stack trace."""

from collections.abc import Iterable


class UsageError(ValueError):
    """An option, a file or a checkpoint that cannot work.

    The message names what was given and what to type instead; `run.py` prints it without a traceback.
    """


def require_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise UsageError unless <option>=value, such as module.loss=kl, is one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise UsageError(f"{option}={value} is not known; type one of {', '.join(choices)}")


def require_at_least(least: float, **options: float) -> None:
    """Raise UsageError for the first option that is below `least`; data__rows stands for data.rows."""
    for name, value in options.items():
        if value < least:
            raise UsageError(f"{name.replace('__', '.')}={value} must be at least {least}")


def require_share(**options: float) -> None:
    """Raise UsageError for the first option that does not lie between 0 and 1; data__share stands for data.share."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise UsageError(f"{name.replace('__', '.')}={value} must lie between 0 and 1")


def require_forward_passes(option: str, numbers: list[int], response_length: int) -> None:
    """Raise UsageError unless all numbers of forward passes lie between 1 and the response length."""
    if min(numbers) < 1 or max(numbers) > response_length:
        raise UsageError(
            f"{option}={numbers} must lie between 1 and the response length {response_length}; "
            f"type for example {option}=[1,2,{min(4, response_length)}]"
        )
