"""The table at the end: one row for each decoder, only the columns that the record has values for."""

from typing import Any

from rich import box
from rich.table import Table

# column title -> (where the value is, how it is written)
COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "valid": (("quality", "validity"), ".3f"),
    "valid|all": (("quality", "validity_all"), ".3f"),
    "valid|part": (("quality", "validity_part"), ".3f"),
    "valid|none": (("quality", "validity_none"), ".3f"),
    "NLL of valid": (("quality", "exact_nll"), ".2f"),
    "truth": (("quality", "exact_nll_truth"), ".2f"),
    "exact match": (("quality", "exact_match"), ".3f"),
    "slot acc.": (("quality", "slot_accuracy"), ".3f"),
    "BLEU": (("quality", "bleu"), ".1f"),
    "self-BLEU": (("quality", "self_bleu"), ".1f"),
    "entropy": (("entropy",), ".2f"),
    "TV": (("quality", "tv"), ".2f"),
    "coverage": (("quality", "coverage"), ".2f"),
    "distinct": (("distinct",), ".2f"),
    "tokens/s": (("cost", "tokens_per_s"), ",.0f"),
    "MFLOP/token": (("cost", "flops_per_token"), "mega"),
}
# the same of texts without a prompt
TEXT_COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "judge|perplexity": (("quality", "judge_perplexity"), ".1f"),
    "entropy|in a text": (("quality", "text_entropy"), ".2f"),
    "of all|tokens": (("quality", "unigram_entropy"), ".2f"),
    "distinct-2": (("quality", "distinct_2"), ".3f"),
    "distinct-3": (("quality", "distinct_3"), ".3f"),
}
# the same of texts between two models
PAIR_COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "style": (("quality", "style"), ".3f"),
    "NLL|by θ": (("quality", "nll_theta"), ".3f"),
    "NLL|by t": (("quality", "nll_target"), ".3f"),
    "kept": (("cost", "acceptance"), ".3f"),
    "speed-up": (("cost", "speedup_vs_naive"), ".2f"),
    "formula": (("cost", "speedup_formula"), ".2f"),
    "G-test p": (("quality", "g_test_p"), ".3f"),
    "largest error": (("quality", "max_enumeration_error"), ".0e"),
}
# the same of the model itself, whatever it generates
MODEL_COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "nats/token": (("quality", "nll"), ".4f"),
    "nats ≤": (("quality", "nll_bound"), ".4f"),
    "nats|truth": (("quality", "nll_truth"), ".4f"),
    "nats|baseline": (("quality", "baseline_nll"), ".4f"),
    "tokens a|concept": (("quality", "compression"), ".2f"),
    "nats|by plan": (("quality", "nll_given_plan"), ".4f"),
    "by other|plan": (("quality", "dnll_shuffle"), "+.4f"),
    "rebuilt": (("quality", "reconstruction"), ".3f"),
    "plan|bits": (("quality", "rate_bits"), ".2f"),
    "gain|bits": (("quality", "gain_bits"), "+.2f"),
    "η": (("quality", "efficiency"), ".3f"),
    "plan|told": (("quality", "joint_information"), ".3f"),
    "told by|chance": (("quality", "joint_information_shuffled"), ".3f"),
    "perplexity": (("quality", "perplexity"), ".3f"),
    "bits/byte": (("quality", "bits_per_byte"), ".4f"),
    "bits/byte ≤": (("quality", "bits_per_byte_bound"), ".4f"),
    "probe": (("quality", "probe"), ".3f"),
    "probe|mean": (("quality", "probe_mean"), ".3f"),
    "untrained": (("quality", "probe_untrained"), ".3f"),
    "shuffled": (("quality", "probe_shuffled"), ".3f"),
    "chance": (("quality", "probe_chance"), ".3f"),
    "goal|Mtok": (("quality", "goal_tokens"), "mega"),
    "goal|s": (("quality", "goal_seconds"), ".1f"),
    "Mtok": (("quality", "train_tokens"), "mega"),
    "s": (("quality", "train_seconds"), ".1f"),
    "GFLOP/step": (("quality", "flops_per_step"), "giga"),
    "TFLOP": (("quality", "train_flops"), "tera"),
    "prefill|tokens/s": (("cost", "prefill_tokens_per_s"), ",.0f"),
    "decode|tokens/s": (("cost", "decode_tokens_per_s"), ",.0f"),
    "KV|MB": (("cost", "kv_bytes"), "mega"),
}
EVERY_COLUMN = TEXT_COLUMNS | COLUMNS | PAIR_COLUMNS | MODEL_COLUMNS
SCALES = {"mega": 1e6, "giga": 1e9, "tera": 1e12}


# what a narrow terminal does without first; all of it is in record.json
DISPENSABLE = ("MFLOP/token", "coverage", "TV", "valid|all", "valid|none", "truth", "NLL of valid", "distinct")
PAIR_DISPENSABLE = ("formula", "kept", "largest error")
MODEL_DISPENSABLE = ("perplexity", "chance", "probe|mean", "Mtok", "s", "TFLOP", "told by|chance", "nats|truth")


def split_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record with its decoders' rows and, where there is one, with the row of the model itself: a table each."""
    rows = record["rows"]
    parts = [[row for row in rows if row["method"] != "model"], [row for row in rows if row["method"] == "model"]]
    return [{**record, "rows": part} for part in parts if part]


def results_table(record: dict[str, Any], width: int = 120) -> Table:
    """A rich table of the record's rows, no wider than `width` characters as long as dispensable columns can go."""
    titles = _used_columns(record)
    first = max(len(row["decoder"]) for row in record["rows"]) + len("forwards") + 6

    widths = {
        t: 2 + max(len(text) for text in (heading(t), *(_cells(r, [t])[0] for r in record["rows"]))) for t in titles
    }
    for title in (*DISPENSABLE, *PAIR_DISPENSABLE, *MODEL_DISPENSABLE):
        if first + sum(widths[t] for t in titles) <= width:
            break
        titles = [t for t in titles if t != title]
    table = Table(
        title=f"{record['experiment']} on {record['data']['name']}, seed {record['seed']}, {record['device']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("decoder", no_wrap=True)
    table.add_column("forwards", justify="right")
    for title in titles:
        table.add_column(heading(title), justify="right", no_wrap=True)
    previous = None
    for row in record["rows"]:
        if previous not in (None, row["method"]):
            table.add_section()
        previous = row["method"]
        table.add_row(row["decoder"], str(row["forwards"] or "-"), *_cells(row, titles))
    return table


def markdown_table(record: dict[str, Any]) -> str:
    """The same table as Markdown, every column that has a value."""
    titles = _used_columns(record)
    lines = ["| decoder | forwards | " + " | ".join(heading(t) for t in titles) + " |"]
    lines.append("| --- |" + " ---: |" * (len(titles) + 1))
    for row in record["rows"]:
        lines.append(f"| {row['decoder']} | {row['forwards'] or '-'} | " + " | ".join(_cells(row, titles)) + " |")
    return "\n".join(lines)


def in_words(record: dict[str, Any]) -> list[str]:
    """Sentences that say what the rows mean, made from the rows' own numbers."""
    rows, correlation = record["rows"], record["data"]["conditional_total_correlation"]
    sentences = []
    truth = next((row["quality"].get("entropy_truth") for row in rows if row["quality"].get("entropy_truth")), None)
    if truth is not None:
        sentences.append(
            f"Truth: the unprompted texts have entropy {truth:.2f} nats; read entropy and TV beside the resampling floor, "
            "which is the truth measured with as many samples."
        )
    if correlation is not None:
        sentences.append(
            f"Given its prompt a text's words still share {correlation:.2f} nats (total correlation). One forward from a "
            "fixed all-mask response draws or picks every place on its own, so no such generator's samples can come nearer "
            f"to the truth than KL {correlation:.2f}, which the product of marginals reaches."
        )
    stated = record["data"].get("reference_slot_accuracy")
    if stated is not None:
        sentences.append(
            f"People's own texts for these prompts state {_percent(stated)} of the slot values word for word."
        )
    between = _between_two_models(rows)
    sentences += between or _student_against_teacher(rows) + _judged(rows)
    marginals = next((r for r in rows if r["decoder"] == "product of marginals"), None)
    for row in rows:
        part = row["quality"].get("validity_part")
        if row["method"] != "student" or row["forwards"] != 1 or marginals is None or part is None:
            continue
        sentences.append(
            f"{row['decoder']}, {row['forwards']} forward: {_percent(row['quality']['validity_all'])} valid with the whole "
            f"plan prompted, {_percent(part)} with part of it "
            f"(product of marginals {_percent(marginals['quality']['validity_part'])}), "
            f"{_diversity(row)}"
        )
    return sentences


def _diversity(row: dict[str, Any]) -> str:
    if row["distinct"] is None or row["entropy"] is None:
        return "no text without a prompt was asked for."
    if row["entropy"] < 1e-9:
        return "and without a prompt it says one text and nothing else."
    return f"and {row['distinct']:.2f} of its unprompted texts are distinct."


def _student_against_teacher(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence: the exact match of the student with fewest forwards beside the teacher's at fewest and at most."""
    known = [r for r in rows if r["quality"].get("exact_match") is not None]
    students = [r for r in known if r["method"] == "student"]
    students = [r for r in students if r["forwards"] == min(s["forwards"] for s in students)]
    teachers = sorted((r for r in known if r["method"] == "teacher"), key=lambda r: r["forwards"])
    if not students or not teachers:
        return []
    best, first, last = max(students, key=lambda r: r["quality"]["exact_match"]), teachers[0], teachers[-1]
    share = [_percent(r["quality"]["exact_match"]) for r in (best, first, last)]
    return [
        f"Exact match: {best['decoder']}, {best['forwards']} forward: {share[0]}; "
        f"teacher {share[1]} at {first['forwards']} and {share[2]} at {last['forwards']} forwards. The student writes "
        f"{best['cost']['tokens_per_s'] / last['cost']['tokens_per_s']:.1f} times the teacher's tokens per second at "
        f"{last['forwards']} forwards (batch {best['cost']['batch']})."
    ]


def _judged(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence: what the judge makes of real text and of each one-forward text, beside how varied they are."""
    known = [row for row in rows if row["quality"].get("judge_perplexity") is not None]
    shown = [row for row in known if row["forwards"] == 1 or row["method"] == "control"]
    parts = [
        f"{row['decoder']}{', 1 forward' if row['forwards'] else ''}: {row['quality']['judge_perplexity']:.1f} at "
        f"{row['quality']['text_entropy']:.2f}"
        for row in shown
    ]
    if not parts:
        return []
    listed = "; ".join(parts)
    return [f"Judge's perplexity, at nats of entropy within a text (less is repetition): {listed}."]


def _between_two_models(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence: how likely both models find q*'s texts, beside their own."""
    models = [row for row in rows if row["method"] == "teacher" and row["quality"].get("nll_theta") is not None]
    drawn = [row for row in rows if row["method"] == "student" and row["quality"].get("nll_theta") is not None]
    if len(models) != 2 or not drawn:
        return []
    (own, other), q = models, drawn[0]
    by = [[row["quality"][name] for row in (own, q, other)] for name in ("nll_theta", "nll_target")]
    return [
        f"Between the models: π_θ needs {by[0][0]:.3f} nats a token for its own texts, {by[0][1]:.3f} for those of q* and "
        f"{by[0][2]:.3f} for π_t's; π_t needs {by[1][2]:.3f} for its own, {by[1][1]:.3f} for q*'s and {by[1][0]:.3f} for π_θ's."
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def heading(title: str) -> str:
    """A column's title as it is shown."""
    return title.replace("|", " ")


def _used_columns(record: dict[str, Any]) -> list[str]:
    return [
        title for title, (path, _) in EVERY_COLUMN.items() if any(value_at(r, path) is not None for r in record["rows"])
    ]


def _cells(row: dict[str, Any], titles: list[str]) -> list[str]:
    return [written(value_at(row, EVERY_COLUMN[title][0]), EVERY_COLUMN[title][1]) for title in titles]


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
