"""Prompts typed on the command line or read from a file."""

import codecs
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from rich.console import Console

from datamodules.sources import valid_text
from datamodules.text_encoding import require_utf8
from models.functional.errors import UsageError


def read_prompts(prompt: Any, prompt_file: str | None, n: int) -> list[str]:
    """Each line of `prompt_file`, or `prompt`, n times. No prompt at all is the empty one.

    prompt: text, or the number or truth value that the command line made of it; None for none.
    prompt_file: UTF-8 with one prompt a line. A line ends with \\n or \\r\\n, and blank ones are skipped.
    """
    if n < 1:
        raise UsageError(f"n={n} must be at least 1")
    prompts = [_typed(prompt)] if prompt_file is None else _lines(Path(prompt_file))
    return [text for text in prompts for _ in range(n)]


def _typed(prompt: Any) -> str:
    """A prompt as it was typed: "1e3" too, of which the command line makes 1000.0."""
    if prompt is None:
        return ""
    plain = OmegaConf.to_container(prompt) if OmegaConf.is_config(prompt) else prompt
    text = plain if isinstance(plain, str) else _on_the_command_line(plain)
    try:
        return valid_text(text, "prompt=")
    except ValueError as error:
        raise UsageError(f"{error}; type it in UTF-8, or type prompt_file=FILE") from error


def _on_the_command_line(value: Any) -> str:
    """The characters of prompt= that became this value; its own where there are none, as in a configuration made by hand."""
    parser = OverridesParser.create()
    for typed in HydraConfig.get().overrides.task if HydraConfig.initialized() else []:
        name, _, text = typed.partition("=")
        if name.lstrip("+") == "prompt" and parser.parse_override(typed).value() == value:
            return text
    return str(value).lower() if isinstance(value, bool) else str(value)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UsageError(f"prompt_file={path} does not exist; give a text file with one prompt a line")
    try:
        data = path.read_bytes()
        require_utf8(data)
        lines = data.removeprefix(codecs.BOM_UTF8).decode().split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"prompt_file={path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UsageError(f"prompt_file={path} cannot be read ({error})") from error
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
