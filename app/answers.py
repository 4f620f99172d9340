"""`answers_file=`: prompts and their responses as rows that `data.train=` reads, so that another model can learn from them.

Training on the texts of a model is sequence-level knowledge distillation (Kim and Rush, 1606.07947).
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.functional.errors import UsageError


class AnswersFile:
    """One JSON object a line, {prompt_field: prompt, response_field: response}, in a file that is named when it is complete.

    Lines are gathered in `<file>.<digest>.partial`. The digest is of the prompts and of `made_with`. So the same
    command goes on where it was stopped, and another one begins anew.

    prompts: as their rows have them. made_with: whatever else decides the responses. together: rows are written in groups of
    this many. Raises UsageError for a file that exists or cannot be written, and while another process writes it.
    """

    def __init__(
        self, path: Path, fields: tuple[str, str], prompts: Sequence[Any], made_with: Any, together: int
    ) -> None:
        require_new(path)
        self.path, self.fields, self.prompts = path, fields, prompts
        digest = hashlib.sha256(json.dumps([fields, prompts, made_with], default=str).encode()).hexdigest()[:8]
        self._partial = path.with_name(f"{path.name}.{digest}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("a+b")
        except OSError as error:
            raise UsageError(f"answers_file={path} cannot be written ({error})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError:
            self._file.close()
            raise UsageError(f"answers_file={path} is being written by another process; wait for it") from None
        self.done = self._keep_whole_groups(together)

    def _keep_whole_groups(self, together: int) -> int:
        """How many lines an interrupted run has left in whole groups; the rest is cut off."""
        self._file.seek(0)
        lines = self._file.readlines()
        whole = len(lines) - bool(lines and not lines[-1].endswith(b"\n"))
        done = whole if whole == len(self.prompts) else whole - whole % together
        self._file.truncate(sum(map(len, lines[:done])))
        return done

    def add(self, responses: Sequence[str]) -> None:
        """Write the responses to the next prompts, and see that they are on disk."""
        name, response_name = self.fields
        for prompt, response in zip(self.prompts[self.done : self.done + len(responses)], responses, strict=True):
            row = {name: prompt, response_name: response}
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += len(responses)

    def close(self) -> None:
        """Give the file its name, if it is complete."""
        if self.done == len(self.prompts):
            require_new(self.path)
            os.replace(self._partial, self.path)
        self._file.close()


def require_new(path: Path) -> None:
    """Raise UsageError for a file that exists, and for one that is not named as JSON lines."""
    if path.suffix != ".jsonl":
        better = path.with_name(f"{path.name.split('.')[0]}.jsonl")
        raise UsageError(f"answers_file={path} is written in JSON lines; type answers_file={better}")
    if os.path.lexists(path):
        raise UsageError(f"answers_file={path} exists and is not replaced; type another name")
