"""The table of normalised mutual information (NMI) of concept slots and attributes."""

from rich import box
from rich.table import Table
from torch import Tensor

from reporting.table import as_markdown


def slot_lines(slots: list[str], nmi: Tensor, matched: dict[int, int]) -> list[list[str]]:
    """A line for each slot: its name and its NMI (S, A) with each attribute, a star at the one it is matched to."""
    rows = enumerate(nmi.tolist())
    return [[slots[s], *(f"{v:.3f}{'*' if matched.get(s) == a else ''}" for a, v in enumerate(row))] for s, row in rows]


def slot_table(attributes: list[str], lines: list[list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("slot", no_wrap=True)
    for name in attributes:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def slot_markdown(attributes: list[str], lines: list[list[str]]) -> str:
    return as_markdown(["slot", *attributes], lines)
