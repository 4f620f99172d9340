"""Prompts typed on the command line or read from a file."""

from pathlib import Path

from models.functional.errors import UsageError


def read_prompts(prompt: str | None, prompt_file: str | None, n: int) -> list[str]:
    """The lines of `prompt_file`, or `prompt` (the empty one where it is None) n times."""
    if n < 1:
        raise UsageError(f"n={n} must be at least 1")
    if prompt_file is None:
        return [str(prompt or "")] * n
    path = Path(prompt_file)
    if not path.is_file():
        raise UsageError(f"prompt_file={path} does not exist; give a text file with one prompt a line")
    try:
        prompts = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"prompt_file={path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error
    if not prompts:
        raise UsageError(f"prompt_file={path} is empty; give a text file with one prompt a line")
    return prompts
