"""Records as runs leave them."""

from reporting.keys import FORMAT

COST_KEYS = {"tokens_per_forward", "tokens_per_s", "flops_per_token", "peak_memory_bytes", "batch"} | {
    "seconds_per_batch", "nfe_per_batch", "seconds_alone", "first_token_seconds",
}  # fmt: skip


# -- record files ----------------------------------------------------------------------------------------------------


def quality(**known: float) -> dict:
    return {"validity": None, "exact_match": None, **known}


def row(method: str, decoder: str, nfe: int, figures: dict, **other) -> dict:
    cost = {"tokens_per_s": 1234.5, "flops_per_token": 3.4e6, "peak_memory_bytes": None, "batch": 8}
    extra = {"entropy": None, "distinct": 0.5, "n_samples": 64, "ci95": {}} | other
    return {
        "method": method,
        "decoder": decoder,
        "nfe": nfe,
        "quality": figures,
        "cost": cost if nfe else dict.fromkeys(COST_KEYS),
        **extra,
    }


def make_record(rows: list[dict], correlation: float | None = None) -> dict:
    facts = {"name": "corpus", "entropy_nats_per_token": None, "conditional_total_correlation": correlation}
    head = {
        "format": FORMAT,
        "experiment": "trial",
        "commit": "abc",
        "seed": 3,
        "device": "cpu",
        "versions": {},
        "config": {},
    }
    return head | {"data": facts, "rows": rows}
