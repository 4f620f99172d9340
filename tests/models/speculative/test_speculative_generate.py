"""Speculative sampling of one Hugging Face model through `generate`: its own texts, whoever drafts."""

import pytest
import torch
from helpers.qwen import tiny_qwen

from models.functional.errors import UsageError
from models.speculative.block_drafter import BlockDrafter, BlockDrafterOptions
from models.speculative.exactness import g_test
from models.speculative.generate import qstar_generate, speculative_generate
from models.speculative.ngram import NgramScores

MODEL, OTHER = tiny_qwen(0, vocabulary=12), tiny_qwen(1, vocabulary=12)
IDS = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 4, 5, 4], [0, 0, 0, 0, 8]])
MASK = (IDS != 0).long()


def drafter(dependence, verifiers=None):
    torch.manual_seed(0)
    options = BlockDrafterOptions(draft_length=4, window=6, dependence=dependence, rank=4)
    return BlockDrafter(verifiers or {"theta": MODEL}, options, 12).eval()


DRAFTERS = {
    "none": lambda: drafter("none"),
    "markov": lambda: drafter("markov"),
    "noise": lambda: drafter("noise"),
    "ngram": lambda: NgramScores(12),
    "another model": lambda: OTHER,
    "itself": lambda: tiny_qwen(0, vocabulary=12),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("verify", ["token", "block", "shared_noise"])
def test_greedy_texts_are_those_of_the_model(name, verify):
    """Padded prompts of different lengths; texts end where they end."""
    plain = MODEL.generate(IDS, attention_mask=MASK, do_sample=False, max_new_tokens=20)
    out = MODEL.generate(
        IDS, attention_mask=MASK, do_sample=False, max_new_tokens=20, return_dict_in_generate=True,
        custom_generate=speculative_generate, draft_model=DRAFTERS[name](), verify=verify, gamma=4,
    )  # fmt: skip
    assert torch.equal(out.sequences, plain)
    assert "target" not in out.details.forwards
    if name == "itself":
        assert out.details.acceptance == {"assistant": 1.0}
        assert out.details.forwards["theta"] < 12


@pytest.mark.parametrize("name", ["markov", "noise"])
def test_sampled_texts_have_the_distribution_of_the_model(name):
    """Pairs of tokens at a temperature, against the model's own logits; the model without the temperature is the control."""
    n, prompt = 3000, torch.tensor([[5, 6, 7]])
    torch.manual_seed(1)
    texts = MODEL.generate(
        prompt.expand(n, -1), do_sample=True, temperature=2.0, top_k=0, max_new_tokens=2, eos_token_id=None,
        custom_generate=speculative_generate, draft_model=DRAFTERS[name](),
    )[:, 3:]  # fmt: skip
    counts = torch.bincount(texts @ torch.tensor([12, 1]), minlength=144).float()

    def p_value(temperature):
        with torch.no_grad():
            first = (MODEL(prompt).logits[0, -1] / temperature).log_softmax(-1)
            pairs = torch.cat([prompt.expand(12, -1), torch.arange(12).unsqueeze(-1)], 1)
            second = (MODEL(pairs).logits[:, -1] / temperature).log_softmax(-1)
        return g_test(counts, (first.unsqueeze(-1) + second).exp().flatten())

    assert p_value(2.0) > 1e-3
    assert p_value(1.0) < 1e-6


def test_a_drafter_of_two_models_drafts_for_q_star():
    both = {"theta": MODEL, "target": OTHER}
    options = {"do_sample": False, "max_new_tokens": 12, "attention_mask": MASK}
    options |= {"custom_generate": qstar_generate, "target_model": OTHER}
    plain = MODEL.generate(IDS, gamma=0, **options)
    assert torch.equal(MODEL.generate(IDS, draft_model=drafter("markov", both), **options), plain)
    with pytest.raises(UsageError, match="hidden states of target"):
        MODEL.generate(IDS, custom_generate=speculative_generate, draft_model=drafter("markov", both), max_new_tokens=4)
