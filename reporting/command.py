"""Commands that one can paste: quoted for Hydra first, then for the shell."""

import re
import shlex

PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")
LITERALS = ("null", "true", "false", "nan", "inf")  # words that Hydra reads as values of another type


def option(name: str, value: str) -> str:
    """`name=value` as Hydra reads it back: the value in quotes where its grammar would take it for something else."""
    if PLAIN.fullmatch(value) and value.lower() not in LITERALS:
        return f"{name}={value}"
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no interpolation
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f"{name}='{text}'"


def command(*options: str) -> str:
    """The line to paste into a shell that runs these options."""
    return " ".join(["python run.py", *(shell(typed) for typed in options)])


def shell(argument: str) -> str:
    """The argument as a shell reads it back, in double quotes where they are enough."""
    if shlex.quote(argument) == argument or set(argument) & set('"$`\\!'):
        return shlex.quote(argument)
    return f'"{argument}"'
