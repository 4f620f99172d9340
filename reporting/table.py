"""The table of a run's results: one row for each decoder, and one for the model itself."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

MOST_COLUMNS = 8  # of a table on a terminal, the decoder's name and NFE counted
NFE = "NFE: number of function evaluations, the forward passes for one text"
SCALES = {"milli": 1e-3, "mega": 1e6, "giga": 1e9, "tera": 1e12}


@dataclass(frozen=True)
class Column:
    """title: its head. path: the keys that lead to its value in a record's row. form: how the value is written.

    note: what the head does not say, for the line below the table.
    """

    title: str
    path: tuple[str, ...]
    form: str
    note: str = ""

    @property
    def name(self) -> str:
        return self.path[-1]

    def cell(self, row: dict[str, Any]) -> str:
        return written(value_at(row, self.path), self.form)


# the most important first: a terminal shows the first few that have values
COLUMNS = (
    # texts of a decoder
    Column("valid", ("quality", "validity"), ".3f"),
    Column("exact match", ("quality", "exact_match"), ".3f"),
    Column("slot acc.", ("quality", "slot_accuracy"), ".3f"),
    Column("BLEU", ("quality", "bleu"), ".1f"),
    Column("judge PPL", ("quality", "judge_perplexity"), ".1f", "PPL: perplexity"),
    Column("entropy/text", ("quality", "text_entropy"), ".2f", "entropy/text: of the tokens within a text, nats"),
    Column("NLL by θ", ("quality", "nll_theta"), ".3f", "NLL by θ, by t: nats a token under π_θ, under π_t"),
    Column("NLL by t", ("quality", "nll_target"), ".3f"),
    Column("acceptance", ("cost", "acceptance"), ".3f", "acceptance: share of drafted tokens that are accepted"),
    Column(
        "tokens/verification",
        ("cost", "tokens_per_verifier_forward"),
        ".2f",
        "tokens/verification: of a text, for each pass of a verifier, the one over its prompt included",
    ),
    Column(
        "accepted length",
        ("cost", "accepted_length"),
        ".2f",
        "accepted length: accepted tokens of a draft, the token after them not counted",
    ),
    Column("speed-up", ("cost", "speedup_vs_naive"), ".2f"),
    Column("G-test p", ("quality", "g_test_p"), ".3f"),
    Column("max error", ("quality", "max_enumeration_error"), ".0e"),
    Column("entropy", ("entropy",), ".2f", "entropy: of texts without a prompt, nats"),
    Column("valid, no prompt", ("quality", "validity_none"), ".3f"),
    Column("TV", ("quality", "tv"), ".2f", "TV: total variation distance to the corpus"),
    Column("coverage", ("quality", "coverage"), ".2f", "coverage: share of the corpus' plans that occur"),
    Column("self-BLEU", ("quality", "self_bleu"), ".1f"),
    Column("unigram entropy", ("quality", "unigram_entropy"), ".2f"),
    Column("tokens/s", ("cost", "tokens_per_s"), ",.0f"),
    Column("TPF", ("cost", "tokens_per_forward"), ".2f", "TPF: generated tokens per forward pass, end padding not counted"),
    Column("distinct", ("distinct",), ".2f"),
    Column("distinct-2", ("quality", "distinct_2"), ".3f"),
    Column("distinct-3", ("quality", "distinct_3"), ".3f"),
    Column("valid, part prompted", ("quality", "validity_part"), ".3f"),
    Column("valid, all prompted", ("quality", "validity_all"), ".3f"),
    Column("NLL of valid", ("quality", "exact_nll"), ".2f"),
    Column("NLL of data", ("quality", "exact_nll_truth"), ".2f"),
    Column("style", ("quality", "style"), ".3f"),
    Column("expected speed-up", ("cost", "speedup_formula"), ".2f"),
    Column("MFLOP/token", ("cost", "flops_per_token"), "mega"),
    Column("trained weights", ("cost", "trained_weights"), ",.0f"),
    Column("of base", ("cost", "trained_share"), ".1%", "of base: trained weights over those of the frozen base"),
    # a model itself, whatever it generates
    Column("NLL", ("quality", "nll"), ".4f", "NLL: nats a token"),
    Column("NLL ≤", ("quality", "nll_bound"), ".4f", "NLL ≤: upper bound, nats a token"),
    Column("NLL exact", ("quality", "nll_exact"), ".4f", "NLL exact: nats a token, the sum over all plans or indices"),
    Column("data NLL", ("quality", "nll_truth"), ".4f", "data NLL: under the corpus' own distribution"),
    Column("above data", ("derived", "above_truth"), ".4f"),
    Column("perplexity", ("quality", "perplexity"), ".3f"),
    Column("bits/byte", ("quality", "bits_per_byte"), ".4f"),
    Column("bits/byte ≤", ("quality", "bits_per_byte_bound"), ".4f"),
    Column("tokens/concept", ("quality", "compression"), ".2f"),
    Column("baseline NLL", ("quality", "baseline_nll"), ".4f"),
    Column("ΔNLL shuffled", ("quality", "dnll_shuffle"), "+.4f", "ΔNLL shuffled: given another text's plan"),
    Column("rate", ("quality", "rate_bits"), ".2f", "rate: -log2 p(plan given prompt), bits a text"),
    Column("gain", ("quality", "gain_bits"), "+.2f", "gain: bits of a text that its plan saves"),
    Column("gain/rate", ("quality", "efficiency"), ".3f"),
    Column("probe acc.", ("quality", "probe"), ".3f", "probe acc.: attributes read from a hidden state by a linear probe"),
    Column("probe, untrained", ("quality", "probe_untrained"), ".3f"),
    Column("Mtok to goal", ("quality", "goal_tokens"), "mega"),
    Column("s to goal", ("quality", "goal_seconds"), ".1f"),
    Column("TFLOP to goal", ("derived", "goal_flops"), "tera"),
    Column("NLL given plan", ("quality", "nll_given_plan"), ".4f"),
    Column("NLL any order", ("quality", "nll_any_order"), ".4f", "NLL any order: bound, one token a pass"),
    Column("reconstruction", ("quality", "reconstruction"), ".3f"),
    Column("MI/H(plan)", ("quality", "joint_information"), ".3f"),
    Column("MI/H, shuffled", ("quality", "joint_information_shuffled"), ".3f"),
    Column("probe, mean state", ("quality", "probe_mean"), ".3f"),
    Column("probe, shuffled", ("quality", "probe_shuffled"), ".3f"),
    Column("probe, chance", ("quality", "probe_chance"), ".3f"),
    Column("train Mtok", ("quality", "train_tokens"), "mega"),
    Column("train s", ("quality", "train_seconds"), ".1f"),
    Column("GFLOP/step", ("quality", "flops_per_step"), "giga"),
    Column("train TFLOP", ("quality", "train_flops"), "tera"),
    # what a text costs alone and in a batch
    Column("ms alone", ("cost", "seconds_alone"), "milli", "ms alone: of a text at batch 1"),
    Column("ms to first token", ("cost", "first_token_seconds"), "milli"),
    Column("ms a batch", ("cost", "seconds_per_batch"), "milli", "ms a batch: of data.eval_batch_size texts"),
    Column("NFE a batch", ("cost", "nfe_per_batch"), ".1f", "NFE a batch: forward passes that a batch takes"),
    Column("prefill tokens/s", ("cost", "prefill_tokens_per_s"), ",.0f"),
    Column("decode tokens/s", ("cost", "decode_tokens_per_s"), ",.0f"),
    Column("KV MB", ("cost", "kv_bytes"), "mega"),
)  # fmt: skip


def split_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record with its decoders' rows and, where there is one, with the row of the model itself: a table each."""
    rows = record["rows"]
    parts = [[row for row in rows if row["method"] != "model"], [row for row in rows if row["method"] == "model"]]
    return [{**record, "rows": part} for part in parts if part]


def nfe_cell(nfe: float) -> str:
    """Forward passes of a text; a mean over texts has one decimal."""
    return f"{nfe:.1f}" if isinstance(nfe, float) else str(nfe or "-")


def results_table(record: dict[str, Any], width: int = 120) -> Table:
    """A rich table of the record's rows: at most MOST_COLUMNS columns, and no wider than `width` characters if it can be."""
    rows, heads = record["rows"], _heads(record)
    columns = used_columns(rows)[: MOST_COLUMNS - len(heads)]
    left = width - 2 - sum(2 + max(len(head), *(len(text) for text in texts)) for head, texts in heads.items())
    widths = [2 + max(len(column.title), *(len(column.cell(row)) for row in rows)) for column in columns]
    while len(columns) > 1 and sum(widths[: len(columns)]) > left:
        columns = columns[:-1]
    notes = [NFE] if "NFE" in heads else []
    table = Table(
        title=f"{record['experiment']} on {record['data']['name']}, seed {record['seed']}, {record['device']}",
        caption="; ".join(notes + [column.note for column in columns if column.note]) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for head in heads:
        table.add_column(head, justify="right" if head == "NFE" else "left", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    previous = None
    for k, row in enumerate(rows):
        if previous not in (None, row["method"]):
            table.add_section()
        previous = row["method"]
        table.add_row(*(texts[k] for texts in heads.values()), *(column.cell(row) for column in columns))
    return table


def markdown_table(record: dict[str, Any]) -> str:
    """The same table as Markdown, with every column that has a value."""
    heads, columns = _heads(record), used_columns(record["rows"])
    cells = [
        [*(texts[k] for texts in heads.values()), *(column.cell(row) for column in columns)]
        for k, row in enumerate(record["rows"])
    ]
    return as_markdown([*heads, *(column.title for column in columns)], cells)


def as_markdown(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table. left: how many columns, from the first on, are set to the left; the others are numbers."""
    lines = [titles, ["---"] * left + ["---:"] * (len(titles) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def used_columns(rows: list[dict[str, Any]]) -> list[Column]:
    """Those that some row has a value for, the most important first."""
    return [column for column in COLUMNS if any(value_at(row, column.path) is not None for row in rows)]


def _heads(record: dict[str, Any]) -> dict[str, list[str]]:
    """The first columns: the decoder's name and, where forward passes were counted, their number."""
    rows = record["rows"]
    names = {"model" if rows[0]["method"] == "model" else "decoder": [row["decoder"] for row in rows]}
    counted = any(row["nfe"] for row in rows)
    return names | ({"NFE": [nfe_cell(row["nfe"]) for row in rows]} if counted else {})


def value_at(row: dict[str, Any], path: tuple[str, ...]) -> float | None:
    """The value at the end of a path of keys in a record's row; None where it ends early."""
    value: Any = row
    for key in path:
        value = value.get(key) if value is not None else None
    return value


def written(value: float | None, form: str) -> str:
    """A number in a column's form, "-" for None."""
    if value is None:
        return "-"
    return f"{value / SCALES[form]:.2f}" if form in SCALES else format(value, form)
