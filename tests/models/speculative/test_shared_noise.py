"""Verification with shared noise: the texts of a seed do not depend on the drafter, bit for bit, and have distribution q*."""

import pytest
import torch
from helpers.qwen import tiny_qwen

from models.functional.errors import UsageError
from models.speculative.block_drafter import BlockDrafter, BlockDrafterOptions
from models.speculative.cached_scores import CachedScores
from models.speculative.decode import decode_qstar
from models.speculative.decoder import QStarDecoder
from models.speculative.exactness import g_test_of
from models.speculative.ngram import NgramScores
from models.speculative.options import DecodingOptions, DraftOptions
from models.speculative.random_source import TorchRandomSource
from models.speculative.state import TextRules

V = 9
MODELS = {
    name: tiny_qwen(seed, vocabulary=V, dtype=torch.float64)
    for name, seed in (("theta", 5), ("target", 6), ("third", 7))
}
PROMPTS = torch.randint(4, V, (4, 6), generator=torch.Generator().manual_seed(0))


def block_drafter(dependence, proposed=None):
    torch.manual_seed(0)
    verifiers = {name: MODELS[name] for name in ("theta", "target")}
    options = BlockDrafterOptions(draft_length=4, window=6, dependence=dependence, rank=4, vocabulary=proposed)
    drafter = BlockDrafter(verifiers, options, V).double().eval()
    if proposed is not None:  # the last ones, so that a column is not the token of its number
        drafter.propose_only(torch.arange(V - proposed, V).flip(0))
    return drafter


def texts(draft, third=None, verify="shared_noise", gamma=4, seed=0):
    scores = CachedScores(third) if draft == "assistant" and isinstance(third, torch.nn.Module) else third
    rng = TorchRandomSource(torch.Generator().manual_seed(seed))
    pair = (CachedScores(MODELS[name]) for name in ("theta", "target"))
    lengths = torch.tensor([6, 3, 5, 4])
    drafting = DraftOptions(draft, gamma, verify)
    return decode_qstar(
        *pair, PROMPTS, drafting, TextRules(24, eos_ids=(3,)), lengths=lengths, rng=rng, assistant=scores
    )


DRAFTERS = {
    "none": lambda: ("block_drafter", block_drafter("none")),
    "markov": lambda: ("block_drafter", block_drafter("markov")),
    "noise": lambda: ("block_drafter", block_drafter("noise")),
    "none, some tokens": lambda: ("block_drafter", block_drafter("none", 6)),
    "markov, some tokens": lambda: ("block_drafter", block_drafter("markov", 6)),
    "noise, some tokens": lambda: ("block_drafter", block_drafter("noise", 6)),
    "ngram": lambda: ("assistant", NgramScores(V)),
    "a third model": lambda: ("assistant", MODELS["third"]),
    "theta itself": lambda: ("assistant", MODELS["theta"]),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_texts_are_those_of_no_drafter(name):
    """Ragged prompts, ends, rejections; token verification with the same seed is the control."""
    plain = texts("theta", gamma=0)
    out = texts(*DRAFTERS[name]())
    assert torch.equal(out.tokens, plain.tokens)
    assert torch.equal(out.lengths, plain.lengths)
    torch.testing.assert_close(out.log_q, plain.log_q, atol=1e-10, rtol=0, equal_nan=True)
    assert len(set(plain.lengths.tolist())) > 1
    assert sum(out.accepted.values()) == sum(out.accepted_at)
    assert not torch.equal(texts(*DRAFTERS[name](), verify="token").tokens, plain.tokens)
    assert not torch.equal(texts("theta", gamma=0, seed=1).tokens, plain.tokens)


def test_equal_noise_makes_an_equal_model_draw_equal_tokens():
    """One model, drafted by a copy of itself: every draft is accepted whole. By another model some are not."""
    theta = CachedScores(MODELS["theta"])
    for third, share in ((MODELS["theta"], 1.0), (MODELS["third"], 0.95)):
        drafting, rng = (
            DraftOptions("assistant", 4, "shared_noise"),
            TorchRandomSource(torch.Generator().manual_seed(0)),
        )
        out = decode_qstar(theta, theta, PROMPTS, drafting, TextRules(24), rng=rng, assistant=CachedScores(third))
        assert (out.acceptance["assistant"] == 1.0) if share == 1.0 else (0 < out.acceptance["assistant"] < share)


def test_texts_have_the_distribution():
    sizes = {"response_length": 2, "vocab_size": V, "end_ids": None}
    options = DecodingOptions(verify="shared_noise", gamma=2)
    theta, target = (tiny_qwen(seed, vocabulary=V) for seed in (5, 6))
    decoder = QStarDecoder(theta, target, "ngram", options, **sizes)
    listed = torch.cartesian_prod(*[torch.arange(V)] * 2)
    assert g_test_of(decoder, torch.tensor([4, 5, 6]), listed, 4000, torch.Generator().manual_seed(0)) > 1e-3


def test_a_pair_that_drafts_for_itself_is_refused():
    with pytest.raises(UsageError, match="verify=shared_noise needs a third model"):
        DraftOptions("alternate", 4, "shared_noise")
