"""Names of figures in records and logs: what older runs called them, and what they are called now.

Every reader of a file that a run left (record.json, job.json, a checkpoint's state) passes it through here.
"""

import re
from typing import Any

FORMAT = 2  # of record.json; a record without "format" is of format 1

# key of a row in a record of format 1 -> key now
ROW_KEYS = {"forwards": "nfe"}
# figure of a record or log, as a pattern -> name now; what the pattern's group matches stays
FIGURES = {
    r"nll_given_own": "nll_own_condition",
    r"token_accuracy_forced": "token_accuracy_teacher_forced",
    r"token_accuracy_free": "token_accuracy_free_running",
    r"bleu_forced": "bleu_teacher_forced",
    r"bleu_free": "bleu_free_running",
    r"rebuilt_dropped_(\d+)": r"reconstruction_dropped_\1",
    r"nll_listed": "nll_enumerated",
    r"nll_listed_best": "nll_enumerated_best",
}


def current_name(name: str) -> str:
    """A figure's name today; of a log key such as `monitor/<name>` or `result/<name>` the part before the slash stays."""
    group, slash, figure = name.rpartition("/")
    for old, new in FIGURES.items():
        if re.fullmatch(old, figure):
            return group + slash + re.sub(old, new, figure)
    return name


def current_names(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures under the names of today, in their order."""
    return {current_name(name): value for name, value in figures.items()}


def upgrade_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record of any earlier format in the format of today; the argument is left as it is."""
    return {**record, "format": FORMAT, "rows": [_upgrade_row(row) for row in record["rows"]]}


def _upgrade_row(row: dict[str, Any]) -> dict[str, Any]:
    renamed = {ROW_KEYS.get(key, key): value for key, value in row.items()}
    return renamed | {part: current_names(renamed[part]) for part in ("quality", "cost", "ci95") if part in renamed}
