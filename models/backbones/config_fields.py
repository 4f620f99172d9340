"""Fields of a published config.json: what is asked of them before they become those of a network here."""

import json
from typing import Any

from models.functional.errors import UsageError


def require_computed(config: dict, name: str, fields: dict[str, tuple[Any, list[Any]]], example: str) -> None:
    """Raise UsageError for the first field with a value that the network here does not compute.

    fields: field -> (what the original code takes where config.json leaves it out, the values that are computed exactly).
    name: of the layout, in messages. example: a checkpoint that is read.
    """
    for field, (default, accepted) in fields.items():
        value = config.get(field, default)
        if value not in accepted:
            given = f"{field} is {json.dumps(value)}" + ("" if field in config else " (the original's default)")
            raise UsageError(
                f"the {name} config's {given}, and this body computes only {field} = {json.dumps(accepted[0])}; "
                f"use a checkpoint of the published shape, such as {example}"
            )


def row_of_table(name: str, field: str, value: Any, rows: int) -> int:
    """The id in a field. Errors: UsageError that names the field, where it is none of the rows of the table."""
    if not isinstance(value, int) or not 0 <= value < rows:
        raise UsageError(f"the {name} config's {field} {json.dumps(value)} is not one of the {rows} rows of its table")
    return value


def positive(
    name: str, config: dict, field: str, kind: type[int] | type[float] = int, default: float | None = None
) -> Any:
    """The number above 0 in a field. Errors: UsageError that names the field, for anything else."""
    value = config.get(field, default)
    if not isinstance(value, (int, kind)) or isinstance(value, bool) or value <= 0:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"the {name} config's {field} is {json.dumps(value)}; it has to be {what} above 0")
    return kind(value)
