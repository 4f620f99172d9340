"""report.html of `mode=report`: charts with values on hover, tables that sort, texts side by side. One file, no network.

A template of the project, reporting/page.html, rather than a chart library: plotly's script alone is 4 MB, and a page of ours
is a few kB. Everything that comes from a record is escaped, and the page's content policy forbids loading anything.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from reporting.figure import LOWER_IS_BETTER, TITLES, UNBOUNDED
from reporting.gather import (
    COLUMN,
    STUDENT_COLOURS,
    FrontierRow,
    frontier_rows,
    known_figures,
    shown_qualities,
    written_mean,
)
from reporting.sentences import summary
from reporting.table import NFE, nfe_cell

TEMPLATE = Path(__file__).with_name("page.html")
BODY = "<!-- body -->"
COLOURS = {
    "teacher": ("#3b6ea5", "#6f9fd0", "#1f9aa5", "#5b7a99"),
    "student": STUDENT_COLOURS,
    "control": ("#7a7a7a", "#a0a0a0"),
}
WIDTH, HEIGHT = 420, 280  # of a chart, in the units of its viewBox
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40  # its margins

LEAST = 1e-9  # what a logarithmic axis shows of values down to 0

Series = tuple[str, str, str]  # method, experiment, decoder


@dataclass(frozen=True)
class Axis:
    """Values of a figure -> positions between `begin` and `end`. log: by powers."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(max(v, LEAST)) if self.log else v for v in (self.low, self.high, value))
        return self.begin + (self.end - self.begin) * ((at - low) / (high - low) if high > low else 0.5)

    def ticks(self) -> list[float]:
        """Powers of two where the axis is logarithmic, else five values at equal distances."""
        if not self.log:
            return [self.low + k * (self.high - self.low) / 4 for k in range(5)]
        powers = range(math.ceil(math.log2(self.low)), math.floor(math.log2(self.high)) + 1)
        return [2.0**k for k in powers][:: max(1, math.ceil(len(powers) / 8))] or sorted({self.low, self.high})


def report_page(records: list[dict[str, Any]], rows: list[FrontierRow] | None = None) -> str:
    """The page of these records, oldest first. Errors: none; figures that no record has are left out.

    rows: `frontier_rows` of the records, where the caller has them.
    """
    rows = frontier_rows(records) if rows is None else rows
    corpora = list(dict.fromkeys(row.corpus for row in rows))
    sections = [
        _section([row for row in rows if row.corpus == corpus], [r for r in records if r["data"]["name"] == corpus])
        for corpus in corpora
    ]
    head = (
        f"<h1>Runs, quality against forward passes</h1>\n<p class='faint'>{_safe(NFE)}. ± is a 95 % interval of the mean over "
        "seeds. Hover over a mark for its values. A name below the charts hides its marks; a head sorts its table.</p>\n"
    )
    before, after = TEMPLATE.read_text(encoding="utf-8").split(BODY)
    return before + head + "\n".join(sections) + after


def _section(rows: list[FrontierRow], records: list[dict[str, Any]]) -> str:
    """Of one corpus: what happened, charts, tables, texts."""
    newest = {record["experiment"]: record for record in records}
    said = [(name, summary(record["rows"])) for name, record in newest.items()]
    items = "".join(f"<li><b>{_safe(name)}</b>: {_safe(sentence)}</li>\n" for name, sentence in said if sentence)
    parts = [f"<section>\n<h2>{_safe(rows[0].corpus)}</h2>", f"<ul>\n{items}</ul>" if items else ""]
    decoders = [row for row in rows if row.method != "model"]
    parts.append(_charts(decoders))
    for own in (decoders, [row for row in rows if row.method == "model"]):
        if own:
            parts.append(_table(own))
    for name, record in newest.items():
        if record.get("texts"):
            parts.append(_texts(name, record))
    parts.append(f"<p class='faint'>{'<br>'.join(_origin(name, records) for name in newest)}</p>")
    return "\n".join([*filter(None, parts), "</section>"])


# -- charts ----------------------------------------------------------------------------------------------------------


def _charts(rows: list[FrontierRow]) -> str:
    """A chart for each of the corpus' main qualities over NFE, and a legend that all of them share."""
    names = shown_qualities(rows)
    if not names:
        return ""
    lines: dict[Series, list[FrontierRow]] = defaultdict(list)
    for row in rows:
        lines[row.method, row.experiment, row.decoder].append(row)
    counted: dict[str, int] = defaultdict(int)
    colours = {}
    for series in lines:
        known = COLOURS.get(series[0], COLOURS["student"])
        colours[series] = known[counted[series[0]] % len(known)]
        counted[series[0]] += 1
    legend = "".join(
        f"<button type='button' aria-pressed='true' data-series='{k}'><i style='background:{colours[series]}'></i>"
        f"{_safe(series[2])} <span class='faint'>{_safe(series[1])}</span></button>\n"
        for k, series in enumerate(lines)
    )
    figures = "\n".join(_chart(name, lines, colours) for name in names)
    return f"<div class='charts'>\n{figures}\n</div>\n<div class='legend'>\n{legend}</div>"


def _chart(name: str, lines: dict[Series, list[FrontierRow]], colours: dict[Series, str]) -> str:
    """One quality over the forward passes of a text: a mark for each decoder, a dashed line for each control."""
    drawn = {series: [row for row in own if row.mean(name) is not None] for series, own in lines.items()}
    passes = [row.nfe for own in drawn.values() for row in own if row.nfe]
    x = Axis(min(passes, default=1), max(passes, default=1), LEFT + 12, WIDTH - RIGHT - 12, log=True)
    y = _quality_axis(name, [row for own in drawn.values() for row in own])
    marks = [_grid(x, y)]
    for k, (series, own) in enumerate(drawn.items()):
        colour, points = colours[series], sorted(own, key=lambda row: row.nfe)
        marks += [_mark(row, name, x, y, colour, k) for row in points]
        path = " ".join(f"{x(row.nfe):.1f},{y(_mean(row, name)):.1f}" for row in points if row.nfe)
        if path.count(",") > 1:
            marks.append(f"<polyline data-series='{k}' points='{path}' fill='none' stroke='{colour}'/>")
    title = TITLES.get(name, COLUMN[name].title)
    better = ", lower is better" if name in (*LOWER_IS_BETTER, "tv") else ""
    drawing = "\n".join(marks)
    return (
        f"<figure><figcaption>{_safe(title)}{better}</figcaption>\n"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{_safe(title)} over forward passes'>\n{drawing}\n"
        f"<text x='{WIDTH / 2}' y='{HEIGHT - 4}' text-anchor='middle'>forward passes per text (NFE)</text></svg></figure>"
    )


def _quality_axis(name: str, rows: list[FrontierRow]) -> Axis:
    """Shares from 0 to 1, perplexities by powers, others around what there is; upwards on the screen."""
    begin, end = HEIGHT - BOTTOM, TOP
    if name not in UNBOUNDED:
        return Axis(0.0, 1.0, begin, end)
    values = [_mean(row, name) for row in rows]
    if name in LOWER_IS_BETTER:
        low, high = (max(value, LEAST) for value in (min(values, default=1.0), max(values, default=1.0)))
        return Axis(low / 1.2, high * 1.2, begin, end, log=True)
    margin = 0.1 * (max(values) - min(values)) or 1.0
    return Axis(min(values) - margin, max(values) + margin, begin, end)


def _grid(x: Axis, y: Axis) -> str:
    lines = [
        f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(tick):.1f}' y2='{y(tick):.1f}'/>"
        f"<text x='{LEFT - 6}' y='{y(tick) + 4:.1f}' text-anchor='end'>{tick:.4g}</text>"
        for tick in y.ticks()
    ]
    lines += [
        f"<text x='{x(tick):.1f}' y='{HEIGHT - BOTTOM + 16}' text-anchor='middle'>{tick:.3g}</text>"
        for tick in x.ticks()
    ]
    return "\n".join(lines)


def _mark(row: FrontierRow, name: str, x: Axis, y: Axis, colour: str, series: int) -> str:
    """A row of a table as a point with its interval, or as a line where no forward pass was made."""
    value, half = _mean(row, name), row.half_width(name) or 0.0
    told = [row.decoder, row.experiment, f"{COLUMN[name].title} {written_mean(row, name)}"]
    told += [f"NFE {nfe_cell(row.nfe)}"] if row.nfe else []
    told.append(f"{row.seeds} seed{'s' * (row.seeds > 1)}")
    label = _safe("\n".join(told))
    common = f"data-series='{series}' data-tip='{label}' aria-label='{label}' tabindex='0'"
    if not row.nfe:
        return (
            f"<line class='control' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(value):.1f}' y2='{y(value):.1f}' "
            f"stroke='{colour}' stroke-width='2' {common}/>"
        )
    limits = [min(max(y(v), TOP), HEIGHT - BOTTOM) for v in (value - half, value + half)]
    bar = f"<line data-series='{series}' x1='{x(row.nfe):.1f}' x2='{x(row.nfe):.1f}' y1='{limits[0]:.1f}' "
    bar += f"y2='{limits[1]:.1f}' stroke='{colour}'/>"
    return f"{bar if half else ''}<circle cx='{x(row.nfe):.1f}' cy='{y(value):.1f}' r='5' fill='{colour}' {common}/>"


def _mean(row: FrontierRow, name: str) -> float:
    value = row.mean(name)
    assert value is not None
    return value


# -- tables and texts ------------------------------------------------------------------------------------------------


def _table(rows: list[FrontierRow]) -> str:
    """Every figure that some row has; a cell carries its number for sorting."""
    names = known_figures(rows)
    heads: list[tuple[str, str]] = [("experiment", ""), ("decoder", ""), ("NFE", NFE), ("seeds", "")]
    heads += [(COLUMN[name].title, COLUMN[name].note) for name in names]
    top = "".join(
        f"<th scope='col' title='{_safe(note)}'><button type='button'>{_safe(title)}</button></th>"
        for title, note in heads
    )
    lines = []
    for row in rows:
        cells = [f"<td>{_safe(row.experiment)}</td>", f"<td>{_safe(row.decoder)}</td>"]
        cells.append(_number_cell(row.nfe or None, nfe_cell(row.nfe)))
        cells.append(_number_cell(row.seeds, str(row.seeds)))
        cells += [_number_cell(row.mean(name), written_mean(row, name)) for name in names]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    return f"<div class='wide'><table class='figures'><thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"


def _number_cell(value: float | None, text: str) -> str:
    return f"<td data-value='{'' if value is None else repr(float(value))}'>{_safe(text)}</td>"


def _texts(experiment: str, record: dict[str, Any]) -> str:
    """A line for each prompt, a column for each decoder."""
    decoders = list(dict.fromkeys(text["decoder"] for text in record["texts"]))
    lines_of: dict[tuple[str, int], dict[str, dict[str, str]]] = defaultdict(dict)  # a prompt may stand there twice
    counted: dict[tuple[str, str], int] = defaultdict(int)
    for text in record["texts"]:
        both = text["decoder"], text["prompt"]
        lines_of[text["prompt"], counted[both]][text["decoder"]] = text
        counted[both] += 1
    top = "".join(f"<th scope='col'>{_safe(decoder)}</th>" for decoder in ["prompt", *decoders])
    lines = []
    for (prompt, _), texts in lines_of.items():
        cells = "".join(_text_cell(texts.get(decoder)) for decoder in decoders)
        lines.append(f"<tr><th scope='row'>{_safe(prompt)}</th>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f"<h3>Texts of {_safe(experiment)}, seed {_safe(record['seed'])}</h3>\n<div class='wide'><table class='texts'>"
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _text_cell(text: dict[str, str] | None) -> str:
    """A response with what is wrong in it; empty where a decoder has none for the prompt."""
    if text is None:
        return "<td></td>"
    wrong = f"<div class='fault'>{_safe(text['fault'])}</div>" if text.get("fault") else ""
    return f"<td>{_safe(text['response'])}{wrong}</td>"


def _origin(experiment: str, records: Iterable[dict[str, Any]]) -> str:
    """Where an experiment's figures come from."""
    own = [record for record in records if record["experiment"] == experiment]

    def joined(value: Callable[[dict[str, Any]], Any]) -> str:
        return ", ".join(dict.fromkeys(str(value(record)) for record in own))

    commits = joined(lambda record: (record["commit"] or "unknown")[:7] + ("+changes" * _changed(record)))
    seeds = ", ".join(sorted({str(record["seed"]) for record in own}))
    return _safe(f"{experiment}: seeds {seeds} · commit {commits} · {joined(lambda record: record['device'])}")


def _changed(record: dict[str, Any]) -> bool:
    return str(record["commit"]).endswith("+changes")


def _safe(value: Any) -> str:
    """Text of a record as HTML shows it; half of a surrogate pair, which no file can hold, is a question mark."""
    return escape(str(value), quote=True).encode("utf-8", "replace").decode("utf-8")
