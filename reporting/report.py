"""`mode=report`: every record below a folder in tables, figures and one page, quality against cost."""

import os
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from models.functional.errors import UsageError
from reporting.gather import frontier_figure, frontier_markdown, frontier_rows, frontier_table, shown_qualities
from reporting.learning_figure import learning_curves, learning_figure
from reporting.page import report_page
from reporting.rate_figure import rate_figure
from reporting.record import find_records, write_whole
from reporting.tpf_figure import aup_sentences, tpf_curves, tpf_figure


def report_frontier(folder: str | Path, console: Console, elsewhere: Iterable[Path] = ()) -> None:
    """Print the tables, and write report.html, frontier.png, frontier.md and a TensorBoard page to <folder>/report.

    report.html has the tables, charts and texts in one page. tpf.png shows quality against tokens per forward pass, whose
    area (AUP) stands below the tables. learning.png shows validation likelihoods during training, where records have them.
    elsewhere: folders of further runs. Errors: UsageError for a folder without runs, or one that may not be written.
    """
    records = [record for _, record in find_records(folder, elsewhere)]
    rows, parallel = frontier_rows(records), tpf_curves(records)
    out = Path(folder) / "report"
    try:
        out.mkdir(exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(None, "no permission to write there")
    except OSError as error:
        raise UsageError(
            f"the report cannot be written to {out}: {error.strerror}; copy the runs to a folder of your own"
        ) from None
    parts = dict.fromkeys((row.corpus, row.method == "model") for row in rows)  # models have figures of their own
    tables = [[r for r in rows if (r.corpus, r.method == "model") == part] for part in parts]
    for own in tables:
        console.print(frontier_table(own, console.width))
    text = "\n\n".join(f"## {own[0].corpus}\n\n{frontier_markdown(own)}" for own in tables)
    for corpus, sentence in aup_sentences(parallel).items():
        console.print(f"{corpus}: {sentence}", highlight=False, soft_wrap=True)
        text += f"\n\n{corpus}: {sentence}"
    (out / "frontier.md").write_text(text + "\n")
    figures = {"frontier": frontier_figure(rows)} if shown_qualities(rows) else {}
    if (tpf := tpf_figure(parallel)) is not None:
        figures["tpf"] = tpf
    if curves := learning_curves(records):
        figures["learning"] = learning_figure(curves)
    if (rate := rate_figure(rows)) is not None:
        figures["rate"] = rate
    with SummaryWriter(str(out)) as writer:
        for name, drawn in figures.items():
            drawn.savefig(out / f"{name}.png", dpi=130)
            writer.add_figure(name, drawn)
        writer.add_text("frontier", text)
    write_whole(out / "report.html", report_page(records, rows))
    files = ", ".join(f"{out}/{name}.png" for name in figures)
    console.print(f"figures: {files}   table: {out}/frontier.md", highlight=False, soft_wrap=True)
    console.print(f"page: {out}/report.html", highlight=False, soft_wrap=True)
