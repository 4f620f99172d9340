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
nfe: which numbers of forward passes; rows without any, such as controls, stay. experiments: as rows, for a table that compares
experiments. Records of several seeds give means and 95 % intervals.
figure: a file beside the page, in which the table's rows are drawn as `mode=report` draws them, at every number of forward
passes; anew where the table changes. Speeds are drawn where the table has tokens/s. tpf_figure: the same against tokens per
forward pass, with every decoder of the records.
Of a benchmark (its --json FILE) columns are heads of the table that it printed, rows its lines by their first cell; all
without them.

    python -m reporting.publish                            write every table of docs, and of the README beside it, anew
    python -m reporting.publish --check                    say which pages differ from their records, with exit status 1
    python -m reporting.publish add NAME RUN... --command "python run.py ..."    keep the records of runs
    python -m reporting.publish add NAME FILE.json         keep what a benchmark wrote
"""

import argparse
import json
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
from reporting.tpf_figure import tpf_curves, tpf_figure

DOCS = Path(__file__).parent.parent / "docs"
RECORDS = Path("results") / "records"  # in the folder of the documentation
BEGIN = "<!-- results\n"
BLOCK = re.compile(r"(<!-- results\n(.*?)-->\n)((?:(?!<!-- results\n).)*?)(<!-- end of results -->)", re.DOTALL)
BY_TITLE = {column.title: column for column in COLUMNS}
MEASURED = ("benchmark", "commit", "device", "threads", "torch", "rows", "table")  # what is kept of a benchmark's file
DIGITS = 6  # significant ones of a kept figure


@dataclass(frozen=True)
class PublishedTable:
    """What a page says about one of its tables. Errors: UsageError for values that cannot work."""

    name: str
    columns: tuple[str, ...] = ()
    rows: dict[str, str] | None = None
    nfe: tuple[float, ...] | None = None
    experiments: dict[str, str] | None = None
    figure: str | None = None
    tpf_figure: str | None = None

    def __post_init__(self) -> None:
        for option in ("figure", "tpf_figure"):
            file = getattr(self, option)
            if file is not None and Path(file).name != file:
                raise UsageError(
                    f"table {self.name}: {option}={file} is a path; type the name of a file beside the page"
                )


def write_pages(docs: Path) -> list[Path]:
    """Write every table of the pages of `docs` anew; the pages that changed. Nothing is written where one cannot be."""
    changed = _as_recorded(docs)
    for page in pages_of(docs):
        for table in _marks(page.read_text(encoding="utf-8")):
            for file, draw in ((table.figure, _drawn), (table.tpf_figure, _drawn_against_tpf)):
                if file is not None and (page in changed or not (page.parent / file).exists()):
                    draw(table, docs / RECORDS).savefig(page.parent / file, dpi=130)
    for page, text in changed.items():
        page.write_text(text, encoding="utf-8")
    return list(changed)


def differing_pages(docs: Path) -> list[Path]:
    """The pages whose tables are not those of their records."""
    return list(_as_recorded(docs))


def pages_of(docs: Path) -> list[Path]:
    """The README beside `docs`, where there is one, and every page below it."""
    return [page for page in (docs.parent / "README.md",) if page.exists()] + sorted(docs.rglob("*.md"))


def _as_recorded(docs: Path) -> dict[Path, str]:
    """Those pages, with the text that they should have."""
    found = {}
    for page in pages_of(docs):
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
    """Where the figures come from, then the table: Markdown. Errors: UsageError for columns and rows that are not known."""
    if measured := _kept_benchmark(table, records):
        return benchmark_table(table, measured)
    known = _kept(table, records)
    unknown = [title for title in table.columns if title not in (*BY_TITLE, "NFE")]
    if unknown or not table.columns:
        wrong = f"no column is called {unknown[0]}" if unknown else "it has no columns:"
        raise UsageError(f"table {table.name}: {wrong}; known are NFE, {', '.join(BY_TITLE)}")
    rows = _of_passes(_chosen(known, table), table)
    heads = {"experiment": [_named(row.experiment, table.experiments) for row in rows]} if table.experiments else {}
    heads["decoder"] = [_named(row.decoder, table.rows) for row in rows]
    cells = [
        [*(texts[k] for texts in heads.values()), *(_cell(row, title) for title in table.columns)]
        for k, row in enumerate(rows)
    ]
    return "\n".join([*provenance(known), "", as_markdown([*heads, *table.columns], cells, left=len(heads))])


def benchmark_table(table: PublishedTable, measured: dict[str, Any]) -> str:
    """The same of a benchmark: the cells that it printed."""
    heads, lines = measured["table"]["columns"], measured["table"]["rows"]
    _require_known(table.name, dict.fromkeys(table.columns, ""), set(heads), "column")
    _require_known(table.name, table.rows, {line[0] for line in lines}, "row")
    chosen = [heads.index(title) for title in table.columns or heads[1:]]
    named = table.rows or {line[0]: line[0] for line in lines}
    cells = [[named[name], *(line[k] for k in chosen)] for name in named for line in lines if line[0] == name]
    typed, commit = measured["published"]["command"], (measured["commit"] or "unknown")[:7]
    when, clock = measured["published"]["date"], f"{measured['clock']} clock"
    where = [when, f"commit {commit}", measured["device"], clock, f"`{typed}`"]
    return "\n".join([" · ".join(where), "", as_markdown([heads[0], *(heads[k] for k in chosen)], cells, left=1)])


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


def keep_records(name: str, runs: Sequence[Path], command: str | None, docs: Path) -> list[Path]:
    """Copy the records of finished runs, without their options and texts, to where tables are made from; the new files.

    runs: their folders or record.json, or one file that a benchmark wrote.
    command: how such a run is started, with words such as TRAIN in the place of paths. A benchmark's file has its own.
    Errors: UsageError where a run has no record, its commit had changes, or a benchmark's file is of an earlier version.
    """
    kept = []
    for run in runs:
        path = run if run.is_file() else run / "record.json"
        benchmark = _benchmark_of(path)
        missing = [] if benchmark is None else sorted({*MEASURED, "date", "command", "options"} - benchmark.keys())
        if missing or (benchmark is not None and "clock" not in benchmark["options"]):
            lacking = ", ".join(missing or ["clock"])
            raise UsageError(
                f"{path} was written by a benchmark of an earlier version, without {lacking}; measure again with --json FILE"
            )
        record = benchmark or read_record(path)
        if (record["commit"] or "").endswith("+changes"):
            raise UsageError(f"{path} was measured with files that no commit holds; commit them and run it again")
        if "benchmark" in record:
            typed = command or record["command"]
            known = {key: record[key] for key in MEASURED} | {"clock": record["options"]["clock"]}
            small = {**_rounded(known), "published": {"date": record["date"], "command": typed}}
            kept.append(write_record(small, docs / RECORDS / name / f"{record['benchmark']}.json"))
            continue
        if command is None:
            raise UsageError(f'{path} is of a run; type --command "python run.py ..." as well')
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
    add.add_argument("runs", type=Path, nargs="+", help="folders of finished runs, or a benchmark's --json FILE")
    add.add_argument("--command", help="what is typed to repeat them, without paths of this machine")
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
        lists = {name: tuple(options[name]) for name in ("columns", "nfe") if name in options}
        return PublishedTable(**{**options, **lists})
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


def _drawn_against_tpf(table: PublishedTable, records: Path) -> Figure:
    """All decoders of the table's records. Errors: UsageError where no method has two."""
    figure = tpf_figure(tpf_curves(_kept(table, records)))
    if figure is None:
        raise UsageError(f"table {table.name}: no method has two decoders; leave tpf_figure: out")
    return figure


def _kept(table: PublishedTable, records: Path) -> list[dict[str, Any]]:
    """The records of a table. Errors: UsageError where none is kept."""
    known = [read_record(path) for path in sorted((records / table.name).glob("*.json"))]
    if not known:
        raise UsageError(
            f"table {table.name}: no record is kept under this name; type "
            f'python -m reporting.publish add {table.name} RUN_FOLDER --command "..."'
        )
    return _of_experiments(known, table)


def _kept_benchmark(table: PublishedTable, records: Path) -> dict[str, Any] | None:
    """The file of a table that a benchmark measured. Errors: UsageError for several."""
    found = [measured for path in sorted((records / table.name).glob("*.json")) if (measured := _benchmark_of(path))]
    if len(found) > 1:
        raise UsageError(f"table {table.name}: {len(found)} benchmarks are kept under this name; keep a table for each")
    return found[0] if found else None


def _benchmark_of(path: Path) -> dict[str, Any] | None:
    """What a benchmark wrote; None of any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "benchmark" in found else None


def _of_passes(rows: list[FrontierRow], table: PublishedTable) -> list[FrontierRow]:
    """The rows of the numbers of forward passes that the table names, and those without any."""
    if table.nfe is None:
        return rows
    known = {row.nfe for row in rows if row.nfe}
    if missing := [nfe for nfe in table.nfe if nfe not in known]:
        raise UsageError(
            f"table {table.name}: no row has nfe={missing[0]}; known are {', '.join(map(str, sorted(known)))}"
        )
    return [row for row in rows if not row.nfe or row.nfe in table.nfe]


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
        shown = [row.values.get(BY_TITLE[title].name, []) for title in table.columns if title != "NFE"]
        if row.seeds < wanted or any(0 < len(values) < wanted for values in shown):
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
