"""Tables of the documentation, made from the records of runs.

A page marks where a table stands; what lies between the marks is written anew from docs/results/records/NAME/*.json:

    <!-- results
    name: e2e_masked
    columns: [NFE, slot acc., BLEU]
    rows: {"teacher, greedy": random remasking}
    -->
    ...
    <!-- end of results -->

columns: heads of `reporting.table.COLUMNS`, or NFE. rows: which decoders, and how the page calls them; all without it.
experiments: the same for a table that compares experiments. Records of several seeds give means and 95 % intervals.
figure: a file beside the page, in which the table's rows are drawn as `mode=report` draws them; anew where the table changes.
Speeds are drawn where the table has tokens/s.

    python -m reporting.publish                            write every table of docs anew
    python -m reporting.publish --check                    say which pages differ from their records, with exit status 1
    python -m reporting.publish add NAME RUN... --command "python run.py ..."    keep the records of runs
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from models.functional.errors import UsageError
from reporting.console import print_error
from reporting.gather import FrontierRow, frontier_figure, frontier_rows, written_mean
from reporting.record import read_record, write_record
from reporting.table import COLUMNS, as_markdown, nfe_cell, written

DOCS = Path(__file__).parent.parent / "docs"
RECORDS = Path("results") / "records"  # in the folder of the documentation
BEGIN = "<!-- results\n"
BLOCK = re.compile(r"(<!-- results\n(.*?)-->\n)((?:(?!<!-- results\n).)*?)(<!-- end of results -->)", re.DOTALL)
BY_TITLE = {column.title: column for column in COLUMNS}
DIGITS = 6  # significant ones of a kept figure


@dataclass(frozen=True)
class PublishedTable:
    """What a page says about one of its tables. Errors: UsageError for values that cannot work."""

    name: str
    columns: tuple[str, ...]
    rows: dict[str, str] | None = None
    experiments: dict[str, str] | None = None
    figure: str | None = None

    def __post_init__(self) -> None:
        unknown = [title for title in self.columns if title not in (*BY_TITLE, "NFE")]
        if unknown:
            raise UsageError(
                f"table {self.name}: no column is called {unknown[0]}; known are NFE, {', '.join(BY_TITLE)}"
            )
        if self.figure is not None and Path(self.figure).name != self.figure:
            raise UsageError(
                f"table {self.name}: figure={self.figure} is a path; type the name of a file beside the page"
            )


def write_pages(docs: Path) -> list[Path]:
    """Write every table of the pages below `docs` anew; the pages that changed. Nothing is written where one cannot be."""
    changed = _as_recorded(docs)
    for page in sorted(docs.rglob("*.md")):
        for table in _marks(page.read_text(encoding="utf-8")):
            path = None if table.figure is None else page.parent / table.figure
            if path is not None and (page in changed or not path.exists()):
                _drawn(table, docs / RECORDS).savefig(path, dpi=130)
    for page, text in changed.items():
        page.write_text(text, encoding="utf-8")
    return list(changed)


def differing_pages(docs: Path) -> list[Path]:
    """The pages whose tables are not those of their records."""
    return list(_as_recorded(docs))


def _as_recorded(docs: Path) -> dict[Path, str]:
    """Those pages, with the text that they should have."""
    found = {}
    for page in sorted(docs.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = with_tables(text, docs / RECORDS)
        if new != text:
            found[page] = new
    return found


def with_tables(text: str, records: Path) -> str:
    """A page with all its tables as the records below `records` have them. Errors: UsageError for a mark without its end."""
    if text.count(BEGIN) != len(BLOCK.findall(text)):
        raise UsageError(
            "a page has a table that begins with <!-- results and does not end with <!-- end of results -->"
        )
    return BLOCK.sub(lambda found: found[1] + "\n" + table_of(_read_mark(found[2]), records) + "\n\n" + found[4], text)


def table_of(table: PublishedTable, records: Path) -> str:
    """Where the figures come from, then the table: Markdown."""
    known = _kept(table, records)
    rows = _chosen(known, table)
    heads = {"experiment": [_named(row.experiment, table.experiments) for row in rows]} if table.experiments else {}
    heads["decoder"] = [_named(row.decoder, table.rows) for row in rows]
    cells = [
        [*(texts[k] for texts in heads.values()), *(_cell(row, title) for title in table.columns)]
        for k, row in enumerate(rows)
    ]
    return "\n".join([*provenance(known), "", as_markdown([*heads, *table.columns], cells, left=len(heads))])


def provenance(records: Sequence[dict[str, Any]]) -> list[str]:
    """Date, commit, machine, seeds and command of the runs: a line for each command, and what an interval is."""

    def command(record: dict[str, Any]) -> str:
        return record["published"]["command"]

    lines = []
    for typed, same in groupby(sorted(records, key=command), command):
        runs = list(same)
        parts = [_joined(run["published"]["date"] for run in runs)]
        parts.append("commit " + _joined((run["commit"] or "unknown")[:7] for run in runs))
        parts.append(_joined(run["device"] for run in runs))
        seeds = sorted({run["seed"] for run in runs})
        parts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
        lines += [" · ".join([*parts, f"`{typed}`"]), ""]
    many = len({run["seed"] for run in records}) > 1
    return [*lines, "Mean over seeds and 95 % interval of it." if many else "An interval is 95 % over texts."]


def keep_records(name: str, runs: Sequence[Path], command: str, docs: Path) -> list[Path]:
    """Copy the records of finished runs, without their options and texts, to where tables are made from; the new files.

    command: how such a run is started, with words such as TRAIN in the place of paths.
    Errors: UsageError where a run has no record, or its commit had changes.
    """
    kept = []
    for run in runs:
        path = run if run.is_file() else run / "record.json"
        record = read_record(path)
        if (record["commit"] or "").endswith("+changes"):
            raise UsageError(f"{path} was measured with files that no commit holds; commit them and run it again")
        when = date.fromtimestamp(path.stat().st_mtime).isoformat()
        known = {key: value for key, value in record.items() if key != "texts"}  # of corpora that are not ours
        small = {**_rounded(known), "config": {}, "published": {"date": when, "command": command}}
        parts = (record["data"]["name"], record["experiment"], str(record["seed"]))
        file = "_".join(parts).replace("/", "-")  # a sweep's name has one
        kept.append(write_record(small, docs / RECORDS / name / f"{file}.json"))
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reporting.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="folder of the documentation (default: this checkout's)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    add = parser.add_subparsers(dest="action").add_parser("add", help="keep the records of runs")
    add.add_argument("name", help="of the table")
    add.add_argument("runs", type=Path, nargs="+", help="folders of finished runs, or their record.json")
    add.add_argument("--command", required=True, help="what is typed to repeat them, without paths of this machine")
    typed = parser.parse_args(arguments)
    try:
        if typed.action == "add":
            for path in keep_records(typed.name, typed.runs, typed.command, typed.docs):
                print(f"kept {path}")
        elif typed.check:
            differing = differing_pages(typed.docs)
            for page in differing:
                print(f"{page} differs from its records; type python -m reporting.publish")
            return int(bool(differing))
        else:
            for page in write_pages(typed.docs):
                print(f"wrote {page}")
    except UsageError as error:
        print_error(str(error))
        return 2
    return 0


def _read_mark(text: str) -> PublishedTable:
    try:
        options = yaml.safe_load(text)
        columns = tuple(options.pop("columns"))
        return PublishedTable(columns=columns, **options)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the mark of a table cannot be read ({error}): {text.strip()}") from error


def _marks(text: str) -> list[PublishedTable]:
    return [_read_mark(found[2]) for found in BLOCK.finditer(text)]


def _drawn(table: PublishedTable, records: Path) -> Figure:
    """The rows of a table, called as it calls them, quality against forward passes."""
    rows = [
        replace(row, experiment=_named(row.experiment, table.experiments), decoder=_named(row.decoder, table.rows))
        for row in _chosen(_kept(table, records), table)
    ]
    return frontier_figure(rows, speed="tokens/s" in table.columns)


def _kept(table: PublishedTable, records: Path) -> list[dict[str, Any]]:
    """The records of a table. Errors: UsageError where none is kept."""
    known = [read_record(path) for path in sorted((records / table.name).glob("*.json"))]
    if not known:
        raise UsageError(
            f"table {table.name}: no record is kept under this name; type "
            f'python -m reporting.publish add {table.name} RUN_FOLDER --command "..."'
        )
    return _of_experiments(known, table)


def _of_experiments(records: list[dict[str, Any]], table: PublishedTable) -> list[dict[str, Any]]:
    """The records of the table's experiments, which are of one corpus. Errors: UsageError for what one table cannot show."""
    names = {record["experiment"] for record in records}
    _require_known(table.name, table.experiments, names, "experiment")
    if table.experiments is None and len(names) > 1:
        raise UsageError(
            f"table {table.name}: its records are of {', '.join(sorted(names))}; name them with experiments:"
        )
    own = [record for record in records if table.experiments is None or record["experiment"] in table.experiments]
    corpora = {record["data"]["name"] for record in own}
    if len(corpora) > 1:
        raise UsageError(
            f"table {table.name}: its records are of {' and '.join(sorted(corpora))}; keep a table for each"
        )
    return own


def _chosen(records: list[dict[str, Any]], table: PublishedTable) -> list[FrontierRow]:
    """The rows that the table names, in its order. Errors: UsageError for a name without a row, or a row without some seed."""
    rows = frontier_rows(records)
    _require_known(table.name, table.rows, {row.decoder for row in rows}, "decoder")
    for names, label in ((table.experiments, "experiment"), (table.rows, "decoder")):
        if names is not None:
            order = list(names)
            rows = sorted((r for r in rows if getattr(r, label) in names), key=lambda r: order.index(getattr(r, label)))
    for row in rows:
        wanted = len({record["seed"] for record in records if record["experiment"] == row.experiment})
        if any(0 < len(values) < wanted for values in row.values.values()):
            raise UsageError(
                f"table {table.name}: some of the {wanted} seeds have no {row.decoder!r}, or not all of its figures"
            )
    return rows


def _require_known(table: str, wanted: dict[str, str] | None, known: set[str], kind: str) -> None:
    for name in wanted or {}:
        if name not in known:
            raise UsageError(f"table {table}: no record has the {kind} {name!r}; known are {', '.join(sorted(known))}")


def _named(name: str, names: dict[str, str] | None) -> str:
    return (names or {}).get(name, name)


def _cell(row: FrontierRow, title: str) -> str:
    if title == "NFE":
        return nfe_cell(row.nfe)
    column = BY_TITLE[title]
    interval = row.ci95.get(column.name) if row.seeds == 1 else None
    limits = "" if interval is None else " [{}, {}]".format(*(written(limit, column.form) for limit in interval))
    return written_mean(row, column.name) + limits


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(sorted(values)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_rounded(own) for own in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
