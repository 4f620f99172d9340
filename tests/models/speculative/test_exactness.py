"""Both exactness tests: q* decoders pass them, and decoders with one wrong rule fail."""

import math

import numpy as np
import pytest
import torch
from helpers.qwen import tiny_qwen
from scipy.stats import chi2

import models.speculative.decode as decode
import models.speculative.state as state
from models.speculative.decoder import QStarDecoder
from models.speculative.distribution import MixtureDist
from models.speculative.exactness import (
    enumeration_error,
    g_test,
    g_test_of,
    probable_texts,
    text_log_probs,
    without_ends,
)
from models.speculative.options import DecodingOptions
from models.speculative.random_source import TorchRandomSource

V = 5
THETA, TARGET, THIRD = (
    tiny_qwen(seed, vocabulary=V, eos_token_id=None, pad_token_id=None, bos_token_id=None) for seed in (5, 6, 7)
)
PROMPT = torch.tensor([0, 4, 2])
ALL_TEXTS = torch.cartesian_prod(*[torch.arange(V)] * 2)


def build(scheme, **options):
    """A decoder of texts of two tokens."""
    sizes = {"response_length": 2, "vocab_size": V, "end_ids": None}
    return QStarDecoder(THETA, TARGET, scheme, DecodingOptions(**options), assistant=THIRD, **sizes)


def g_test_p(decoder):
    return g_test_of(decoder, PROMPT, ALL_TEXTS, 4000, torch.Generator().manual_seed(0))


def test_a_g_test_by_hand():
    """2 Σ O log(O/E) over Williams' correction, k - 1 degrees of freedom; rare cells are pooled; one of p = 0 stays empty."""
    counts, expected = torch.tensor([30.0, 50.0, 20.0]), torch.tensor([0.25, 0.5, 0.25])
    statistic = 2 * sum(o * math.log(o / e) for o, e in zip([30, 50, 20], [25, 50, 25], strict=True))
    williams = 1 + (4 + 2 + 4 - 1) / (6 * 100 * 2)
    assert g_test(counts, expected) == pytest.approx(chi2.sf(statistic / williams, 2))
    rare = torch.tensor([0.01, 0.02, 0.97])
    pooled = 2 * (4 * math.log(4 / 3) + 96 * math.log(96 / 97))
    williams = 1 + (1 / 0.03 + 1 / 0.97 - 1) / (6 * 100)
    assert g_test(torch.tensor([1.0, 3.0, 96.0]), rare) == pytest.approx(chi2.sf(pooled / williams, 1))
    assert g_test(torch.tensor([99.0, 1.0]), torch.tensor([1.0, 0.0])) == 0.0
    assert g_test(torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5])) is None  # one cell after pooling shows nothing


def test_p_values_of_small_expected_counts_are_uniform():
    """Of 800 cells with 8 expected, 5 % lie below .05; without the correction it is more than twice as many."""
    draws = np.random.default_rng(0).multinomial(6400, [1 / 800] * 800, size=1000)
    share = np.mean([g_test(torch.from_numpy(d).double(), torch.full((800,), 1 / 800)) < 0.05 for d in draws])
    plain = np.mean([chi2.sf(2 * np.sum(d * np.log(np.maximum(d, 1) / 8)), 799) < 0.05 for d in draws])
    assert 0.03 < share < 0.075
    assert plain > 0.1


def test_the_probabilities_of_all_texts_sum_to_one():
    log_q = text_log_probs(THETA, TARGET, MixtureDist(), PROMPT, ALL_TEXTS, V)
    assert log_q.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("count", [3, 10, 25, 99])
def test_probable_texts_are_the_most_probable_of_all(count):
    """A beam of more than V texts misses none of two tokens; three texts are among the most probable of a narrow one."""
    found = probable_texts(build("naive"), PROMPT, 2, count)
    log_q = text_log_probs(THETA, TARGET, MixtureDist(), PROMPT, ALL_TEXTS, V)
    order = ALL_TEXTS[log_q.argsort(descending=True)].tolist()
    assert len(found) == min(count, 25)
    assert len({tuple(text) for text in found.tolist()}) == len(found)
    if count >= 10:
        assert found.tolist() == order[: len(found)]
    assert found[0].tolist() in order[:2]


def test_texts_that_a_mixture_rules_out_are_not_listed():
    decoder = build("naive", mixture=MixtureDist(top_k=2))
    assert len(probable_texts(decoder, PROMPT, 2, 25)) == 4


@pytest.mark.parametrize("scheme", ["naive", "theta", "alternate"])
def test_a_few_listed_texts_suffice_and_a_wrong_rule_still_fails(scheme, monkeypatch):
    """Texts go on behind end tokens; all texts that are not listed are one cell."""
    decoder = build(scheme)
    decoder.end_ids = (2,)
    endless = without_ends(decoder)
    assert decoder.end_ids == (2,)
    listed = probable_texts(endless, PROMPT, 2, 8)
    draw = torch.Generator().manual_seed(0)
    assert g_test_of(endless, PROMPT, listed, 4000, draw) > 1e-3
    assert g_test_of(decoder, PROMPT, listed, 4000, draw) < 1e-6  # texts that end early are others
    if scheme == "theta":
        monkeypatch.setattr(state, "residual", lambda log_q, _: log_q.exp())
        assert g_test_of(endless, PROMPT, listed, 4000, draw) < 1e-4


@pytest.mark.parametrize(("scheme", "drafted"), [("naive", False), ("theta", True)])
def test_a_speed_up_is_expected_where_tokens_were_drafted(scheme, drafted):
    decoder = build(scheme)
    out = decoder.decode(PROMPT[None], torch.tensor([3]), 2, TorchRandomSource(torch.Generator().manual_seed(0)))
    assert (out.drafts > 0) == drafted
    assert (decoder.expected_speedup(out) is not None) == drafted


@pytest.mark.parametrize("verify", ["token", "block"])
@pytest.mark.parametrize("scheme", ["naive", "theta", "target", "alternate", "ngram", "assistant"])
def test_every_scheme_passes_both_tests(scheme, verify):
    decoder = build(scheme, verify=verify)
    assert enumeration_error(decoder, PROMPT) < 1e-12
    assert g_test_p(decoder) > 1e-3


@pytest.mark.parametrize("scheme", ["ngram"])
def test_sampling_q_again_after_a_rejection_fails_both(scheme, monkeypatch):
    monkeypatch.setattr(state, "residual", lambda log_q, _: log_q.exp())
    assert enumeration_error(build(scheme), PROMPT) > 1e-3
    assert g_test_p(build(scheme)) < 1e-5


@pytest.mark.parametrize("scheme", ["theta", "alternate"])
def test_a_token_of_the_verifier_after_a_draft_accepted_whole_fails(scheme, monkeypatch):
    """The rule of ordinary speculative sampling, where the verifier is the target."""

    def verifiers_token(run, pending, who):
        tokens = run.rng.choose(pending.verifier.exp()) if pending.proposal is None else pending.proposal
        rows, own = pending.rows & run.active, run.score(who.drafter, 0, 1)
        dist = {who.drafter: own, who.verifiers[0]: pending.verifier.unsqueeze(1)}
        run.commit(rows, tokens, run.next_token_dist(**dist).at(0))
        return run.active & ~rows, own[:, 0]

    monkeypatch.setattr(decode, "_resolve", verifiers_token)
    assert enumeration_error(build(scheme), PROMPT) > 1e-3


@pytest.mark.parametrize("scheme", ["ngram", "assistant"])
def test_a_token_of_one_verifier_after_a_third_models_draft_fails(scheme, monkeypatch):
    def targets_token(run, rows, dist):
        run.commit(rows, run.rng.choose(dist.target.exp()), dist)

    monkeypatch.setattr(state.QStarRun, "sample", targets_token)
    assert enumeration_error(build(scheme, gamma=2), PROMPT) > 1e-3
