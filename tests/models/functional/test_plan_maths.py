"""Lengths, prices and information of plans: by hand, by enumeration, and against controls that must fail."""

import math
from itertools import product

import pytest
import torch

from models.functional.plan_information import (
    code_ceiling,
    efficiency,
    flip_rate,
    joint_information,
    nominal_bits,
    shuffled_information,
)
from models.functional.plan_length import eos_loss, expected_length, quota_loss
from models.functional.plan_nll import free_bits, plan_nll, slot_kl

STOP = torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64)


def test_length_and_chance_of_an_end_by_enumeration():
    length, ends = 0.0, 0.0
    for stops in product([0, 1], repeat=3):
        rng = math.prod(s if stop else 1 - s for s, stop in zip(STOP.tolist(), stops, strict=True))
        length += rng * (stops.index(1) if any(stops) else 3)
        ends += rng * any(stops)
    assert expected_length(STOP) == pytest.approx(length)
    assert eos_loss(STOP) == pytest.approx(-math.log(ends))
    assert expected_length(torch.tensor([0.0, 0.0, 1.0, 1.0])) == 2
    assert eos_loss(torch.tensor([0.0, 1.0])) == pytest.approx(0, abs=1e-6)
    assert eos_loss(torch.zeros(2)).isfinite()


def test_lengths_have_the_gradient_of_finite_differences():
    stop = STOP.clone().requires_grad_()
    assert torch.autograd.gradcheck(expected_length, stop)
    assert torch.autograd.gradcheck(eos_loss, stop)


def test_quota_controls_the_mean_by_hand():
    lengths = torch.tensor([1.0, 3.0], requires_grad=True)
    assert quota_loss(lengths, 2.0) == 0
    quota_loss(lengths, 1.0).backward()
    assert lengths.grad.tolist() == [1.0, 1.0]
    assert quota_loss(lengths, 1.0, multiplier=-3.0) == 1.0 - 3.0
    lengths.grad = None
    quota_loss(lengths, 2.0, multiplier=-3.0).backward()
    assert lengths.grad.tolist() == [-1.5, -1.5]


def test_price_and_divergence_of_plans_by_enumeration():
    """Two slots; choice 0 ends. KL of the sequences = expectation of the slots' KLs, over all plans."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, dtype=torch.float64, generator=generator).log_softmax(-1)  # q and p
    second = torch.randn(2, 3, 3, dtype=torch.float64, generator=generator).log_softmax(-1)  # given the first choice
    plans = [(0, 0)] + [(a, b) for a in (1, 2) for b in (0, 1, 2)]
    choices = torch.tensor(plans)
    is_open = torch.stack([torch.ones(7, dtype=torch.bool), choices[:, 0] != 0], -1)
    log_q, log_p = (torch.stack([first[m].expand(7, -1), second[m][choices[:, 0]]], 1) for m in (0, 1))
    nll_q, nll_p = plan_nll(log_q, choices, is_open).sum(-1), plan_nll(log_p, choices, is_open).sum(-1)
    weights = (-nll_q).exp()
    assert weights.sum() == pytest.approx(1)  # an ended sequence has no further price
    by_slots = (weights * slot_kl(log_q, log_p, is_open).sum(-1)).sum()
    assert by_slots == pytest.approx((weights * (nll_p - nll_q)).sum().item())
    assert slot_kl(log_q, log_q, is_open).abs().max() == 0


def test_free_bits_ask_nothing_below_the_floor():
    kl = torch.tensor([0.1, 0.9], requires_grad=True)
    held = free_bits(kl, 0.5)
    assert held.tolist() == pytest.approx([0.5, 0.9])
    held.sum().backward()
    assert kl.grad.tolist() == [0.0, 1.0]


def test_nominal_bits_and_efficiency_by_hand():
    assert nominal_bits([(8, 1, 1), (4, 2, 2)]) == pytest.approx(3 + 4)
    assert nominal_bits([(2, 0, 2)]) == pytest.approx(math.log2(1 + 2 + 4))
    assert efficiency(10.0, 4.0, 8.0) == 0.75
    assert math.isnan(efficiency(1.0, 1.0, 0.0))


def draws(n: int, values: int, seed: int) -> torch.Tensor:
    return torch.randint(values, (n, 2), generator=torch.Generator().manual_seed(seed))


def test_concepts_that_rename_the_plan_hold_all_of_it_and_others_none():
    plans = draws(4000, 3, 0)
    renamed = torch.stack(
        [(plans.sum(-1) * 5) % 7, plans[:, 0] * 2], -1
    )  # the joint tells the plan, no slot alone does
    told, of_plan = joint_information(renamed, plans)
    assert told / of_plan == pytest.approx(1, abs=1e-3)
    assert of_plan == pytest.approx(2 * math.log(3), rel=0.01)
    half, _ = joint_information(renamed[:, 1:], plans)
    assert half / of_plan == pytest.approx(0.5, abs=0.01)
    assert abs(joint_information(draws(4000, 3, 1), plans)[0]) < 0.02
    assert abs(shuffled_information(renamed, plans)[0]) < 0.02


def test_a_name_of_its_own_for_every_text_is_exposed_by_the_shuffled_control():
    plans, own = draws(300, 4, 0), torch.arange(300).unsqueeze(-1)
    told, of_plan = joint_information(own, plans)
    assert told / of_plan == pytest.approx(1, abs=1e-9)
    assert shuffled_information(own, plans)[0] / of_plan > 0.9


def ceiling(codes: list[int], seed: int = 0) -> tuple[float, float]:
    """Six texts under three prompts: the function, and the same summed up prompt by prompt and text by text."""
    generator = torch.Generator().manual_seed(seed)
    joint = torch.rand(3, 6, generator=generator, dtype=torch.float64).square()
    joint /= joint.sum()
    weights, texts = joint.sum(1), joint.sum(0)
    given = joint / weights.unsqueeze(1)
    found = code_ceiling(texts, given, weights, torch.tensor(codes))
    rate = gain = 0.0
    for u, x in product(range(3), range(6)):
        same = [k for k in range(6) if codes[k] == codes[x]]
        of_code = given[u, same].sum().item()
        rate -= joint[u, x].item() * math.log(of_code)
        gain += joint[u, x].item() * math.log((texts[x] / texts[same].sum()).item() / given[u, x].item())
    assert found == pytest.approx((rate, gain))
    return found


def test_what_a_code_can_gain_by_enumeration():
    for numbers in ([0, 1, 2, 3, 4, 5], [3, 5, 1, 0, 2, 4]):  # any code that tells texts apart pays for itself
        rate, gain = ceiling(numbers)
        assert gain == pytest.approx(rate)
    rate, gain = ceiling([0, 0, 1, 1, 2, 2])
    assert gain < rate - 1e-3  # one that does not loses what the text told of its prompt
    rate, gain = ceiling([0] * 6)
    assert rate == pytest.approx(0)
    assert gain < -1e-3


def test_flips_by_hand():
    before = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    after = torch.tensor([[1, 2], [3, 0], [0, 0], [7, 8]])
    assert flip_rate(before, after) == 0.5
    assert flip_rate(before, before) == 0
