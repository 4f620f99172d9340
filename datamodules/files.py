"""Prompt -> response pairs from jsonl, csv and parquet files, or from a data set of the Hugging Face hub.

A line that cannot be used is skipped, counted and named; a file that cannot be used at all is a UsageError.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.sources import (
    LocatedRow,
    Source,
    first_few,
    hub_rows,
    is_hub,
    listed,
    no_such_field,
    read_rows,
    text_of,
    valid_text,
)
from models.functional.errors import UsageError

T = TypeVar("T")


@dataclass
class Pairs:
    """N pairs in file order.

    slots: for a prompt that was a dictionary in the file, its {slot: value} as text; None for a prompt that was text.
    problems: "file:line: reason" for each line that was skipped.
    """

    prompts: list[str] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    slots: list[dict[str, str] | None] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def add(self, prompt: str, response: str, slots: dict[str, str] | None) -> None:
        self.prompts.append(prompt)
        self.responses.append(response)
        self.slots.append(slots)

    def take(self, indices: Iterable[int]) -> "Pairs":
        """The chosen pairs, without the problems (they belong to the files, not to a part of them)."""
        chosen = Pairs()
        for i in indices:
            chosen.add(self.prompts[i], self.responses[i], self.slots[i])
        return chosen


def read_pairs(source: Source, prompt_field: str, response_field: str, *, option: str = "data.train") -> Pairs:
    """Read the two fields of every row of a source.

    source: a file, a glob, `hub:NAME` or `hub:NAME:SPLIT` (split "train" unless given), or a list of these; relative
        paths start at the current directory. jsonl and csv may be gzipped (.gz).
    prompt_field, response_field: text, number or truth value; a prompt may also be a dictionary of these, which is
        written out as "name[The Vaults], eatType[pub]".
    option: how the user named the source, for messages.

    Warns with the first few unusable lines. Raises UsageError when a file does not exist, has an unknown extension, is
    empty, has no such field, or has not a single usable line.
    """
    pairs = Pairs()
    fields = (prompt_field, response_field)
    for item in listed(source, option):
        if is_hub(item):
            _collect(hub_rows(str(item), fields, option), f"{option}={item}", *fields, pairs)
        else:
            _collect(read_rows(Path(item), fields, option), f"{option}: {item}", *fields, pairs)
    if not pairs.prompts:
        raise UsageError(f"{option} names no file; type {option}=FILE.jsonl")
    if pairs.problems:
        rank_zero_warn(f"{option}: {len(pairs.problems)} unusable lines were skipped:\n{first_few(pairs.problems)}")
    return pairs


# -- from rows to pairs ----------------------------------------------------------------------------------------------


def read_each(
    rows: Iterable[LocatedRow], read: Callable[[dict[str, Any]], T]
) -> tuple[list[T], dict[str, None], list[str]]:
    """What `read` makes of each row, the names of all fields, and "file:line: reason" for each row that cannot be used.

    read: raises ValueError with the reason for a row that it cannot use.
    """
    found: list[T] = []
    fields: dict[str, None] = {}
    problems: list[str] = []
    for location, row in rows:
        if isinstance(row, str):
            problems.append(f"{location}: {row}")
            continue
        fields.update(dict.fromkeys(row))
        try:
            found.append(read(row))
        except ValueError as error:
            problems.append(f"{location}: {error}")
    return found, fields, problems


def _collect(rows: Iterable[LocatedRow], where: str, prompt_field: str, response_field: str, pairs: Pairs) -> None:
    def read(row: dict[str, Any]) -> tuple[str, str, dict[str, str] | None]:
        prompt, slots = prompt_of(row, prompt_field)
        return prompt, text_of(row, response_field), slots

    found, fields, problems = read_each(rows, read)
    for option, name in (("prompt_field", prompt_field), ("response_field", response_field)):
        if fields and name not in fields:
            raise no_such_field(where, option, name, fields)
    if not found:
        if not problems:
            raise UsageError(f"{where} is empty; name a file with at least one row")
        raise UsageError(f"{where} has no usable line among {len(problems)}:\n{first_few(problems)}")
    for pair in found:
        pairs.add(*pair)
    pairs.problems.extend(problems)


def prompt_of(row: dict[str, Any], name: str) -> tuple[str, dict[str, str] | None]:
    """The prompt of a row as text, and its slots where it is a dictionary of them. Raises ValueError where it is neither."""
    value = row.get(name)
    if not isinstance(value, dict):
        return text_of(row, name), None
    # Parquet gives every row all slots and marks the absent ones with None.
    slots = {valid_text(str(slot), "a slot's name"): text_of(value, slot) for slot in value if value[slot] is not None}
    return ", ".join(f"{slot}[{text}]" for slot, text in slots.items()), slots
