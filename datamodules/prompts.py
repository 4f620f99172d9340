"""Prompts typed on the command line or read from a file."""

import codecs
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from datamodules.files import prompt_of, read_each
from datamodules.sources import ROW_SUFFIXES, first_few, no_such_field, read_rows, suffix_of, valid_text
from datamodules.text_encoding import require_utf8
from models.functional.errors import UsageError


def read_prompts(prompt: Any, prompt_file: str | None, n: int) -> list[str]:
    """Each line of `prompt_file`, or `prompt`, n times. No prompt at all is the empty one.

    prompt: text, or a value that is written out; None for no prompt.
    prompt_file: UTF-8 with one prompt a line. A line ends with \\n or \\r\\n, in a file without
        any \\n with \\r, and blank ones are skipped.
    """
    require_prompts(prompt, prompt_file, n)
    prompts = [_text(prompt)] if prompt_file is None else _lines(Path(prompt_file))
    return [text for text in prompts for _ in range(n)]


def require_prompts(prompt: Any, prompt_file: str | None, n: int) -> None:
    """Raise UsageError for n below 1, and where both prompt= and prompt_file= are given."""
    if n < 1:
        raise UsageError(f"n={n} must be at least 1")
    if prompt is not None and prompt_file is not None:
        raise UsageError(f"prompt= and prompt_file={prompt_file} are both given; type one of them")


def has_rows(prompt_file: str | None) -> bool:
    """Whether a file of prompts has rows with fields, by its name, and not a prompt a line."""
    return prompt_file is not None and suffix_of(Path(prompt_file)) in ROW_SUFFIXES


def read_prompt_rows(prompt_file: str, field: str) -> dict[str, Any]:
    """The different prompts in a field of a file's rows, in the file's order: {prompt as text: as the row has it}.

    A row without a prompt is left out, with a warning. Raises UsageError where there is none at all.
    """
    path = Path(prompt_file)
    if not path.is_file():
        raise UsageError(
            f"prompt_file={path} does not exist; give a file of rows or a text file with one prompt a line"
        )

    def read(row: dict[str, Any]) -> tuple[str, Any]:
        text, slots = prompt_of(row, field)
        if slots is not None:
            return text, slots
        return text, row[field] if isinstance(row[field], str | int | float | bool) else text

    found, fields, problems = read_each(read_rows(path, [field], "prompt_file"), read)
    if fields and field not in fields:
        raise no_such_field(f"prompt_file: {path}", "prompt_field", field, fields)
    if not found:
        raise UsageError(f"prompt_file={path} has no prompt in its field {field}; see data.prompt_field")
    if problems:
        message = f"prompt_file={path}: {len(problems)} rows without a prompt are left out:\n{first_few(problems)}"
        Console().print(message, markup=False, highlight=False, soft_wrap=True)
    prompts: dict[str, Any] = {}
    for text, value in found:
        prompts.setdefault(text, value)
    return prompts


def _text(prompt: Any) -> str:
    try:
        return "" if prompt is None else valid_text(str(prompt), "prompt=")
    except ValueError as error:
        raise UsageError(f"{error}; type it in UTF-8, or type prompt_file=FILE") from error


def _lines(path: Path) -> list[str]:
    if not os.path.exists(path) or os.path.isdir(path):  # a pipe will do, such as that of <(...)
        is_folder = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UsageError(f"prompt_file={path} {is_folder}; give a text file with one prompt a line")
    try:
        data = path.read_bytes()
        require_utf8(data)
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"prompt_file={path} is not text in UTF-8 ({error.reason} at byte {error.start}); convert it by naming its "
            "encoding, such as `iconv -f windows-1252 -t UTF-8 FILE > NEW`"
        ) from error
    except OSError as error:
        raise UsageError(f"prompt_file={path} cannot be read ({error})") from error
    lines = text.split("\n" if "\n" in text else "\r")
    if not lines[-1]:
        lines.pop()  # what follows the last line's end is no line
    lines = [line.removesuffix("\r") for line in lines]
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"prompt_file={path} is empty; give a text file with one prompt a line")
    if len(prompts) < len(lines):
        message = f"prompt_file={path}: {len(lines) - len(prompts)} blank lines are skipped"
        Console().print(message, markup=False, highlight=False, soft_wrap=True)
    return prompts
