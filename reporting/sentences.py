"""Sentences below the table of a run, made from the record's own numbers."""

import re
from collections import defaultdict
from typing import Any

from models.functional.generated_text import perplexity_at_entropy
from reporting.table import nfe_cell

Row = dict[str, Any]

# main quality of a comparison, the first that both sides know -> (how it is named, how it is written)
MAIN = {
    "validity": ("valid", "share"),
    "slot_accuracy": ("slot accuracy", "share"),
    "exact_match": ("exact match", "share"),
    "judge_perplexity": ("judge perplexity", "number"),
}
NUMBERS = {1: "one"}


def in_words(record: dict[str, Any]) -> list[str]:
    """How to read the table; what happened is in `summary`."""
    rows, data = record["rows"], record["data"]
    sentences = []
    truth = next((row["quality"]["entropy_truth"] for row in rows if row["quality"].get("entropy_truth")), None)
    if truth is not None:
        sentences.append(
            f"Entropy of the corpus' own texts without a prompt: {truth:.2f} nats. Compare entropy and TV with the resampling "
            "floor, which is the corpus itself, sampled as often."
        )
    correlation = data["conditional_total_correlation"]
    if correlation is not None:
        sentences.append(
            f"Total correlation of a text given its prompt: {correlation:.2f} nats. A single forward pass from an all-mask "
            "response draws every position independently. No such generator comes closer to the corpus than KL "
            f"{correlation:.2f}; the product of marginals attains it."
        )
    reference = data.get("reference_slot_accuracy")
    if reference is not None:
        sentences.append(f"Slot accuracy of the human references, exact wording: {_percent(reference)}.")
    return [
        *sentences,
        *_prompted(rows),
        *_likelihoods(rows),
        *_one_alpha(record),
        *_judged(rows),
        *_at_equal_entropy(rows),
        *_parallel(record),
        *_speed(rows),
    ]


def summary(rows: list[Row]) -> str | None:
    """What happened, in one sentence; None where nothing was measured that has a name here."""
    for comparison in (_drafts, _accepted, _compression, _plans, _few_steps, _excess, _one_method, _likelihood, _probe):
        sentence = comparison(rows)
        if sentence is not None:
            return sentence
    return None


# -- one sentence for each kind of comparison ------------------------------------------------------------------------


def _few_steps(rows: list[Row]) -> str | None:
    """The best student with the fewest forward passes beside the teacher with the fewest and with the most."""
    students, teachers = _of(rows, "student"), _of(rows, "teacher")
    if any("speedup_vs_naive" in row["cost"] for row in students):
        return None
    return next(filter(None, (_few_steps_in(name, students, teachers) for name in MAIN)), None)


def _few_steps_in(name: str, students: list[Row], teachers: list[Row]) -> str | None:
    """The same in one quality; None where one side does not know it, or the teacher takes no more passes."""
    students, teachers = _known(students, name), sorted(_known(teachers, name), key=lambda row: row["nfe"])
    if not students or not teachers or (best := _fewest(students, name))["nfe"] >= teachers[-1]["nfe"]:
        return None
    fewest, most = (_value(row, name) for row in (teachers[0], teachers[-1]))
    more = f", with {_number(teachers[-1]['nfe'])}: {most}" if len(teachers) > 1 else ""
    said = f"{_passes(best)}: {_reached(best, name)}; the teacher with {_number(teachers[0]['nfe'])}: {fewest}{more}."
    return _capitalised(said)


def _drafts(rows: list[Row]) -> str | None:
    """The fastest scheme with drafts beside the one without."""
    drafted = [row for row in rows if row["cost"].get("acceptance") is not None]
    drafted = [row for row in drafted if row["cost"].get("speedup_vs_naive") is not None]
    if not drafted:
        return None
    best = max(drafted, key=lambda row: row["cost"]["speedup_vs_naive"])
    exact = best["quality"].get("g_test_p")
    return (
        f"{best['decoder']}: acceptance rate {_percent(best['cost']['acceptance'])}, "
        f"{best['cost']['speedup_vs_naive']:.2f} times the speed of decoding without drafts"
        + (f"; G-test against the exact distribution: p = {exact:.2f}." if exact is not None else ".")
    )


def _accepted(rows: list[Row]) -> str | None:
    """How much of the drafts was accepted, where no decoder without drafts stands beside."""
    name = "tokens_per_verifier_forward"
    drafted = [row for row in rows if row["cost"].get("acceptance") is not None and row["cost"].get(name)]
    if not drafted:
        return None
    best = max(drafted, key=lambda row: row["cost"][name])
    return (
        f"{best['decoder']}: acceptance rate {_percent(best['cost']['acceptance'])}, {best['cost'][name]:.2f} tokens for each "
        "forward pass of a verifier."
    )


def _plans(rows: list[Row]) -> str | None:
    """What a plan costs and saves, and how good the texts are that are written from plans."""
    model = next((row for row in _of(rows, "model") if row["quality"].get("rate_bits") is not None), None)
    if model is None:
        return None
    quality = model["quality"]
    parts = [f"A plan costs {quality['rate_bits']:.1f} bits"]
    if quality.get("gain_bits") is not None:
        parts[0] += f" and saves {quality['gain_bits']:.1f} bits of its text"
    name = next((n for n in MAIN if _known(_of(rows, "student"), n)), None)
    if name is not None:
        last = _known(_of(rows, "student"), name)[-1]  # the sampled one: a greedy one may always write the same text
        parts.append(f"{MAIN[name][0]} with {last['decoder']}: {_value(last, name)}")
    marginals = _marginals(rows)
    if name is not None and marginals is not None and marginals["quality"].get(name) is not None:
        parts.append(f"product of marginals: {_value(marginals, name)}")
    return "; ".join(parts) + "."


def _compression(rows: list[Row]) -> str | None:
    """A language model with concepts in its middle layers beside the same model without."""
    row = next((r for r in _of(rows, "model") if r["quality"].get("compression") is not None), None)
    if row is None or row["quality"].get("baseline_nll") is None or row["quality"].get("nll") is None:
        return None
    quality = row["quality"]
    return (
        f"One concept for {quality['compression']:.1f} tokens: NLL {quality['nll']:.3f} nats a token; "
        f"without concepts: {quality['baseline_nll']:.3f}."
    )


def _excess(rows: list[Row]) -> str | None:
    """How far a model's likelihood is from the corpus' own."""
    for row in _of(rows, "model"):
        quality = row["quality"]
        bound = quality.get("nll") is None
        nll = quality.get("nll_bound" if bound else "nll")
        if nll is not None and quality.get("nll_truth") is not None:
            least = " at most" if bound else ""
            return f"NLL{least} {nll:.3f} nats a token; under the corpus' own distribution: {quality['nll_truth']:.3f}."
    return None


def _one_method(rows: list[Row]) -> str | None:
    """A teacher or a student without the other: its decoder of the fewest forward passes, and that of the most."""
    alone = [own for own in (_of(rows, "teacher"), _of(rows, "student")) if own]
    name = next((n for n in MAIN if len(alone) == 1 and _known(alone[0], n)), None)
    if name is None:
        return None
    # of several with the same passes the last one, the sampled one: a greedy one may always write the same text
    known = list({row["nfe"]: row for row in sorted(_known(alone[0], name), key=lambda row: row["nfe"])}.values())
    ends = known if len(known) == 1 else [known[0], known[-1]]
    said = [f"{row['decoder']}, {_passes(row)}: {_reached(row, name)}" for row in ends]
    marginals = _marginals(rows)
    if marginals is not None and marginals["quality"].get(name) is not None:
        said.append(f"product of marginals: {_value(marginals, name)}")
    return _capitalised("; ".join(said) + ".")


def _likelihood(rows: list[Row]) -> str | None:
    """What a model makes of texts that it has not seen."""
    for row in _of(rows, "model"):
        known = {name: value for name, value in row["quality"].items() if value is not None}
        for name, bound in (("nll", ""), ("nll_bound", " at most")):
            if name in known:
                byte = known.get("bits_per_byte", known.get("bits_per_byte_bound"))
                more = "" if byte is None else f", {byte:.3f} bits a byte"
                return f"NLL of the test texts{bound}: {known[name]:.3f} nats a token{more}."
    return None


def _probe(rows: list[Row]) -> str | None:
    """What the hidden states of a model tell that predicts no tokens."""
    for row in _of(rows, "model"):
        read, untrained = row["quality"].get("probe"), row["quality"].get("probe_untrained")
        if read is not None:
            more = "" if untrained is None else f"; without training: {_percent(untrained)}"
            return f"A linear probe reads {_percent(read)} of the attributes from a hidden state{more}."
    return None


# -- how to read the table -------------------------------------------------------------------------------------------


def _prompted(rows: list[Row]) -> list[str]:
    """One sentence for each one-step student: validity by how much of the plan the prompt states."""
    marginals, sentences = _marginals(rows), []
    for row in _of(rows, "student"):
        part = row["quality"].get("validity_part")
        if row["nfe"] != 1 or marginals is None or part is None:
            continue
        sentences.append(
            f"{row['decoder']}, one forward pass: {_percent(row['quality']['validity_all'])} valid with the whole plan "
            "prompted, "
            f"{_percent(part)} with part of it (product of marginals: {_percent(marginals['quality']['validity_part'])})"
            f"{_diversity(row)}."
        )
    return sentences


def _diversity(row: Row) -> str:
    if row["distinct"] is None or row["entropy"] is None:
        return ""
    if row["entropy"] < 1e-9:
        return "; without a prompt it always generates the same text"
    return f"; {_percent(row['distinct'])} of its texts without a prompt are distinct"


def _speed(rows: list[Row]) -> list[str]:
    """Tokens per second of the student with the fewest forward passes against the teacher's with the most."""
    students = [row for row in _of(rows, "student") if row["cost"].get("tokens_per_s")]
    teachers = [row for row in _of(rows, "teacher") if row["cost"].get("tokens_per_s")]
    if not students or not teachers or any("speedup_vs_naive" in row["cost"] for row in students):
        return []
    fast, slow = min(students, key=lambda row: row["nfe"]), max(teachers, key=lambda row: row["nfe"])
    ratio = fast["cost"]["tokens_per_s"] / slow["cost"]["tokens_per_s"]
    return [
        f"Speed: {fast['decoder']}, NFE {fast['nfe']}, generates {ratio:.1f} times the tokens per second of "
        f"{slow['decoder']}, NFE {slow['nfe']} (batch {fast['cost']['batch']})."
    ]


def _judged(rows: list[Row]) -> list[str]:
    """One sentence: the judge's perplexity of real text and of each one-step text, with the entropy within a text."""
    shown = [row for row in _known(rows, "judge_perplexity") if row["nfe"] == 1 or row["method"] == "control"]
    parts = [
        f"{row['decoder']}{', NFE 1' if row['nfe'] else ''}: {row['quality']['judge_perplexity']:.1f}, "
        f"{row['quality']['text_entropy']:.2f} nats"
        for row in shown
    ]
    return (
        [f"Judge's perplexity and entropy within a text (low entropy: repetition): {'; '.join(parts)}."]
        if parts
        else []
    )


def _at_equal_entropy(rows: list[Row]) -> list[str]:
    """A sentence for held-out text and each student: what decoders of several temperatures reach at the entropy of its texts.

    Perplexity falls with entropy, so that decoders are compared where their entropies are equal.
    """
    known = _known(rows, "judge_perplexity")
    curves: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    for row in known:
        family, _, temperature = row["decoder"].partition(", ")
        if row["method"] != "control" and re.fullmatch(r"|greedy|sampled( at .*)?", temperature):
            curves[family, row["nfe"]].append((row["quality"]["text_entropy"], row["quality"]["judge_perplexity"]))
    said = []
    for row in known:
        held_out = row["decoder"] == "held-out text"
        entropy = row["quality"]["text_entropy"]
        others = [
            f"{family}, NFE {nfe_cell(nfe)}: {found:.1f}"
            for (family, nfe), points in curves.items()
            if (held_out or (row["method"] == "student" and nfe == row["nfe"]))
            if len(points) > 1 and (found := perplexity_at_entropy(points, entropy)) is not None
        ]
        if others:
            name = row["decoder"] if held_out else f"{row['decoder']}, NFE {nfe_cell(row['nfe'])}"
            said.append(
                f"Judge's perplexity at {entropy:.2f} nats within a text, the entropy of {name} "
                f"({row['quality']['judge_perplexity']:.1f}), interpolated between temperatures: {'; '.join(others)}."
            )
    return said


def _parallel(record: dict[str, Any]) -> list[str]:
    """One sentence: accuracy under parallelism of each method with several decoders."""
    aup = record.get("aup")
    if not aup:
        return []
    methods = ", ".join(f"{method} {value:.1f}" for method, value in aup["methods"].items())
    return [f"AUP, the weighted area under {aup['quality'].replace('_', ' ')} over tokens per forward pass: {methods}."]


def _likelihoods(rows: list[Row]) -> list[str]:
    """One sentence: the likelihood of q*'s texts under both models, beside that of their own."""
    models, drawn = _known(_of(rows, "teacher"), "nll_theta"), _known(_of(rows, "student"), "nll_theta")
    if len(models) != 2 or not drawn:
        return []
    own, other = models
    theta, target = ([row["quality"][n] for row in (own, drawn[0], other)] for n in ("nll_theta", "nll_target"))
    return [
        f"NLL, nats a token, of texts by π_θ, q* and π_t: under π_θ {theta[0]:.3f}, {theta[1]:.3f}, {theta[2]:.3f}; "
        f"under π_t {target[0]:.3f}, {target[1]:.3f}, {target[2]:.3f}."
    ]


def _one_alpha(record: dict[str, Any]) -> list[str]:
    """One sentence: the α at which the mean divergences from both models are equal, beside α solved at each position."""
    curve = record.get("alpha_curve")
    if not curve:
        return []
    return [
        f"One α for all {curve['positions']} positions of the test texts: at α* = {curve['alpha_star']:.3f} the mean "
        f"divergence of q_α is {curve['kl_star']:.4f} nats from each model. Solved at each position, the mean of α is "
        f"{curve['alpha_mean']:.3f} and that of the divergence {curve['chernoff_mean']:.4f}."
    ]


# -- choosing and writing --------------------------------------------------------------------------------------------


def _of(rows: list[Row], method: str) -> list[Row]:
    return [row for row in rows if row["method"] == method]


def _known(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row["quality"].get(name) is not None]


def _marginals(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row["decoder"] == "product of marginals"), None)


def _fewest(students: list[Row], name: str) -> Row:
    """The best of those with the fewest forward passes."""
    known = _known(students, name)
    least = min(row["nfe"] for row in known)
    sign = -1 if MAIN[name][1] == "number" else 1  # of a perplexity less is better
    return max((row for row in known if row["nfe"] == least), key=lambda row: sign * row["quality"][name])


def _value(row: Row, name: str) -> str:
    """A main quality of a row, as it is written."""
    return _written(row["quality"][name], MAIN[name][1])


def _reached(row: Row, name: str) -> str:
    """The same with its name."""
    return f"{_value(row, name)} {MAIN[name][0]}" if name == "validity" else f"{MAIN[name][0]} {_value(row, name)}"


def _passes(row: Row) -> str:
    return f"{_number(row['nfe'])} forward pass{'' if row['nfe'] == 1 else 'es'}"


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _number(count: float) -> str:
    return f"{count:.1f}" if isinstance(count, float) else NUMBERS.get(count, str(count))


def _written(value: float, form: str) -> str:
    return _percent(value) if form == "share" else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
