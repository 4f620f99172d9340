"""Prompts typed on the command line or read from a file."""

import codecs
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from datamodules.sources import valid_text
from datamodules.text_encoding import require_utf8
from models.functional.errors import UsageError


def read_prompts(prompt: Any, prompt_file: str | None, n: int) -> list[str]:
    """Each line of `prompt_file`, or `prompt`, n times. No prompt at all is the empty one.

    prompt: text, or a value that is written out; None for no prompt.
    prompt_file: UTF-8 with one prompt a line. A line ends with \\n or \\r\\n, in a file without
        any \\n with \\r, and blank ones are skipped.
    """
    if n < 1:
        raise UsageError(f"n={n} must be at least 1")
    if prompt is not None and prompt_file is not None:
        raise UsageError(f"prompt= and prompt_file={prompt_file} are both given; type one of them")
    prompts = [_text(prompt)] if prompt_file is None else _lines(Path(prompt_file))
    return [text for text in prompts for _ in range(n)]


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
