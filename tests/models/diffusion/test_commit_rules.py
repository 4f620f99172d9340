"""Rules against their definitions, written out position by position, and the sampler's own ends of each rule."""

import pytest
import torch
from torch.testing import assert_close

from models.diffusion.commit_rules import (
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBudget,
    build_rules,
    most_confident,
)
from models.diffusion.sampler import RuleDecoder, generate_by_rule, generate_masked_diffusion
from models.functional.errors import UsageError
from models.functional.next_token import until_end

RULES = {"confidence": ConfidenceThreshold, "factor": ConfidenceFactor, "entropy": EntropyBudget}


def rows_of(batch: int = 4, prompt: int = 2, response: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 11, (batch, prompt + response), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(batch, prompt + response, dtype=torch.bool)
    mask[:, prompt:] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(mask), "response_mask": mask}


def by_hand(name: str, value: float, confidence: list[float], entropy: list[float], competing: list[bool]) -> set[int]:
    """The committed positions of one row, from the rule's definition."""
    masked = [k for k, here in enumerate(competing) if here]
    if not masked:
        return set()
    ranked = sorted(masked, key=lambda k: -confidence[k])
    if name == "confidence":
        return {k for k in masked if confidence[k] >= value} | {ranked[0]}
    if name == "factor":
        fits = [n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - confidence[ranked[n - 1]]) < value]
        return set(ranked[: max(fits, default=1)])
    ranked = sorted(masked, key=lambda k: entropy[k])
    fits = [n for n in range(1, len(ranked) + 1) if sum(entropy[k] for k in ranked[: n - 1]) <= value]
    return set(ranked[: max(fits)])


@pytest.mark.parametrize("value", [0.05, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_commits_what_its_definition_says(name, value):
    generator = torch.Generator().manual_seed(3)
    confidence, entropy = torch.rand(2, 200, 7, generator=generator, dtype=torch.float64)
    confidence = 1 - confidence**4
    competing = torch.rand(200, 7, generator=generator) < 0.7
    competing[0] = False
    found = RULES[name](value)(confidence, entropy, competing)
    for row in range(200):
        wanted = by_hand(name, value, confidence[row].tolist(), entropy[row].tolist(), competing[row].tolist())
        assert set(found[row].nonzero().flatten().tolist()) == wanted


def test_a_threshold_that_nothing_reaches_is_one_token_a_pass(tiny_llada):
    """It is then LLaDA's low-confidence remasking with as many steps as tokens."""
    model, rows = tiny_llada(), rows_of()
    found = generate_by_rule(model, rows, torch.Generator().manual_seed(0), rule=ConfidenceThreshold(1.0))
    wanted = generate_masked_diffusion(
        model, rows, torch.Generator().manual_seed(0), steps=6, temperature=0.0, remasking="low_confidence"
    )
    assert torch.equal(found.responses, wanted)
    assert found.forward_passes.tolist() == [6] * 4


def test_a_threshold_that_all_reach_is_one_pass_a_block(tiny_llada):
    model, rows = tiny_llada(), rows_of()
    found = generate_by_rule(model, rows, torch.Generator().manual_seed(0), rule=ConfidenceThreshold(1e-9))
    wanted = generate_masked_diffusion(model, rows, torch.Generator().manual_seed(0), steps=1, temperature=0.0)
    assert torch.equal(found.responses, wanted)
    assert found.forward_passes.tolist() == [1] * 4
    blocks = generate_by_rule(
        model, rows, torch.Generator(), rule=ConfidenceThreshold(1e-9), block_length=2, guidance=0.5
    )
    assert blocks.forward_passes.tolist() == [6] * 4  # three blocks, two passes each with guidance


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rule_sees_the_probability_of_each_draw_and_the_entropy_behind_it(tiny_llada, temperature):
    model, rows, seen, written = tiny_llada(), rows_of(), [], []

    def rule(confidence, entropy, competing):
        seen.append((confidence, entropy, competing))
        return most_confident(confidence, competing)

    options = {"rule": rule, "temperature": temperature, "on_tokens": written.append}
    found = generate_by_rule(model, rows, torch.Generator().manual_seed(0), **options).responses
    text = torch.where(rows["response_mask"], 2, rows["input_ids"])
    for (confidence, entropy, competing), after in zip(seen, written, strict=True):
        logits = model(text)[:, 2:]
        logits[..., 2] = -torch.inf
        p = torch.distributions.Categorical(logits=logits.double())
        assert torch.equal(competing, text[:, 2:] == 2)
        new = competing & (after != 2)
        assert new.sum() == 4
        assert_close(confidence[new], p.log_prob(found).exp()[new], atol=1e-6, rtol=1e-6)
        own = -(p.probs * p.probs.clamp(min=1e-300).log()).sum(-1)
        assert_close(entropy[competing], own[competing], atol=1e-6, rtol=1e-6)
        text[:, 2:] = after
    assert len(seen) == 6


@torch.no_grad()
def test_the_last_block_of_a_rule_may_be_shorter(tiny_llada):
    """Six tokens in blocks of four: the first four at once, then the last two given them, by hand."""
    model, rows = tiny_llada(), rows_of()
    found = generate_by_rule(model, rows, torch.Generator(), rule=ConfidenceThreshold(1e-9), block_length=4)
    text = torch.where(rows["response_mask"], 2, rows["input_ids"])
    for first, last in ((2, 6), (6, 8)):
        logits = model(text)
        logits[..., 2] = -torch.inf
        text[:, first:last] = logits[:, first:last].argmax(-1)
    assert torch.equal(found.responses, text[:, 2:])
    assert found.forward_passes.tolist() == [2] * 4
    whole = generate_by_rule(model, rows, torch.Generator(), rule=ConfidenceThreshold(1e-9), block_length=16)
    assert whole.forward_passes.tolist() == [1] * 4
    assert not torch.equal(whole.responses, found.responses)


@torch.no_grad()
def test_end_tokens_wait_for_all_others_and_are_then_committed_together(tiny_llada):
    model, rows, ends = tiny_llada(), rows_of(16), (5, 7, 9)
    model.lm_head.weight[list(ends)] *= 1.5
    written = []
    found = generate_by_rule(
        model,
        rows,
        torch.Generator().manual_seed(0),
        rule=ConfidenceThreshold(1.0),
        end_ids=ends,
        ends_last=True,
        on_tokens=written.append,
    )
    text = torch.where(rows["response_mask"], 2, rows["input_ids"])
    passes, together = torch.zeros(16, dtype=torch.long), 0
    for committed in written:
        logits = model(text)[:, 2:]
        logits[..., 2] = -torch.inf
        p, word = logits.double().softmax(-1).max(-1)
        competing, end = text[:, 2:] == 2, torch.isin(word, torch.tensor(ends))
        for row in range(16):
            if not competing[row].any():
                continue
            passes[row] += 1
            others = competing[row] & ~end[row]
            new = committed[row] != text[row, 2:]
            if others.any():
                assert new.tolist() == (p[row] == p[row][others].max()).logical_and(others).tolist()
            else:
                assert torch.equal(new, competing[row])
                together += int(new.sum() > 1)
        text[:, 2:] = committed
    assert together > 0
    assert found.forward_passes.tolist() == passes.tolist()
    assert torch.equal(found.responses, text[:, 2:])


@torch.no_grad()
def test_a_text_that_ended_in_an_earlier_block_takes_no_more_passes_and_is_the_same(tiny_llada):
    model, rows, ends = tiny_llada(), rows_of(32), (7, 5)
    options = {"rule": ConfidenceThreshold(1.0), "block_length": 2}
    usual = generate_by_rule(model, rows, torch.Generator(), **options)
    found = generate_by_rule(model, rows, torch.Generator(), end_ids=ends, **options)
    same = until_end(usual.responses, ends)
    assert torch.equal(until_end(found.responses, ends), same)
    assert torch.equal(found.responses[same], usual.responses[same])
    # blocks after that of the first end token are filled with the first of them, without a pass
    blocks = -(-same.sum(-1) // 2)
    later = torch.arange(6) >= 2 * blocks.unsqueeze(-1)
    assert (found.responses[later] == 7).all()
    assert torch.equal(found.responses[~later], usual.responses[~later])
    assert found.forward_passes.tolist() == (2 * blocks).tolist()
    assert set(blocks.tolist()) == {1, 2, 3}
    assert usual.forward_passes.tolist() == [6] * 32
    short = blocks < 3
    alone = {name: column[short] for name, column in rows.items()}
    assert generate_by_rule(model, alone, torch.Generator(), end_ids=ends, **options).batch_passes == 4


class SlowByTurns:
    """Row 0 commits one token a pass in the second block, row 1 in the first; otherwise all at once."""

    name = "by turns"

    def __init__(self) -> None:
        self.block = -1

    def __call__(self, confidence, entropy, competing):
        self.block += int(competing.all())
        one = most_confident(confidence, competing)
        return torch.stack([competing[k] if self.block == k else one[k] for k in range(2)])


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_a_batch_takes_the_passes_of_its_slowest_row_in_each_block(tiny_llada, guidance):
    """Rows that need (1, 3) and (3, 1) passes for their two blocks need four each, and six together."""
    each = 1 if guidance == 0 else 2
    found = generate_by_rule(
        tiny_llada(), rows_of(2), torch.Generator(), rule=SlowByTurns(), block_length=3, guidance=guidance
    )
    assert found.forward_passes.tolist() == [4 * each, 4 * each]
    assert found.batch_passes == 6 * each


def test_a_row_of_a_batch_is_the_row_alone(tiny_llada):
    """Rows that are done wait: neither their text nor their count changes."""
    model, rows = tiny_llada(), rows_of()
    decoder = RuleDecoder(model, ConfidenceThreshold(0.4), 6)
    together, passes = decoder(rows, torch.Generator().manual_seed(0)), decoder.forward_passes
    assert len(set(passes.tolist())) > 1
    for k in range(4):
        alone = decoder({name: column[k : k + 1] for name, column in rows.items()}, torch.Generator().manual_seed(0))
        assert torch.equal(alone[0], together[k])
        assert decoder.forward_passes.tolist() == [passes[k].item()]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"confidence": [0.0]}, "module.commit_rules.confidence=0.0"),
        ({"factor": [-1.0]}, "module.commit_rules.factor=-1.0"),
        ({"entropy": [-0.1]}, "module.commit_rules.entropy=-0.1"),
        ({"margin": [0.1]}, "module.commit_rules=margin is not known"),
    ],
)
def test_values_out_of_range_are_refused(wanted, message):
    with pytest.raises(UsageError, match=message):
        build_rules(wanted)
