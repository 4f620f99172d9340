"""A `TokenCallback` sees the returned text grow: token by token, or refinement by refinement."""

import pytest
import torch
from helpers.causal import EOS, MASK, tiny_causal
from helpers.concept import concept_parts
from helpers.online import VOCABULARY as ONLINE_WORDS
from helpers.online import tiny_online
from torch import Tensor

from models.backbones.autoregressive import AutoregressiveDecoder
from models.diffusion.sampler import MaskedDiffusionDecoder
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.one_step import OneStepDecoder
from models.flow.prefix_student import PrefixStudent
from models.flow.solver import NoisyMaskDecoder
from models.online.decoder import OnlineConceptDecoder
from models.plans.decoder import PlannedDecoder
from models.speculative.decoder import QStarDecoder
from models.speculative.options import DecodingOptions

RESPONSE = 6


def rows_of(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 11, (batch, 3 + RESPONSE), generator=torch.Generator().manual_seed(1))
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, 3:] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(response), "response_mask": response}


def called_back(decoder, batch: int = 3) -> tuple[Tensor, list[Tensor]]:
    """The text that is returned, with and without a callback, and what the callback saw."""
    seen: list[Tensor] = []
    draw = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    returned = decoder(rows_of(batch), draw(), seen.append)
    assert torch.equal(returned, decoder(rows_of(batch), draw()))
    return returned, seen


def causal(eos_id=None):
    return AutoregressiveDecoder(tiny_causal(), RESPONSE, vocab_size=11, end_ids=eos_id)


def planned():
    _, planner, executor = concept_parts()
    return PlannedDecoder(planner, executor, RESPONSE, vocab_size=11)


def online():
    return OnlineConceptDecoder(tiny_online(), RESPONSE, vocab_size=ONLINE_WORDS)


@pytest.mark.parametrize("build", [causal, lambda: causal(EOS), planned, online])
def test_from_left_to_right_a_token_at_a_time(build):
    decoder = build()
    returned, seen = called_back(decoder)
    assert not decoder.refines
    assert [part.shape[1] for part in seen] == list(range(1, RESPONSE + 1))
    assert all(torch.equal(part, returned[:, : part.shape[1]]) for part in seen)
    assert len(set(returned.flatten().tolist())) > 3  # texts that could differ


@pytest.mark.parametrize("scheme", ["naive", "theta", "alternate", "ngram"])
@pytest.mark.parametrize("eos_id", [None, EOS])
def test_q_star_a_round_at_a_time(scheme, eos_id):
    torch.manual_seed(0)
    pair = [tiny_causal(), tiny_causal()]
    options = DecodingOptions(gamma=2)
    decoder = QStarDecoder(*pair, scheme, options, response_length=RESPONSE, vocab_size=11, end_ids=eos_id)
    returned, seen = called_back(decoder, batch=1)
    assert not decoder.refines
    lengths = [part.shape[1] for part in seen]
    assert lengths == sorted(lengths)
    assert len(seen) > 2
    assert all(torch.equal(part, returned[:, : part.shape[1]]) for part in seen)
    assert torch.equal(seen[-1], returned)


@pytest.mark.parametrize("forwards", [1, 3, 6])
@pytest.mark.parametrize("remasking", ["random", "low_confidence"])
def test_masks_are_filled_forward_by_forward(tiny_llada, forwards, remasking):
    decoder = MaskedDiffusionDecoder(tiny_llada(), forwards, remasking=remasking)
    returned, seen = called_back(decoder)
    assert decoder.refines
    hidden = [(part == MASK).sum(1).tolist() for part in seen]
    assert hidden == [[RESPONSE - (k + 1) * RESPONSE // forwards] * 3 for k in range(forwards)]
    for part in seen:  # what is decided stays
        assert torch.equal(part[part != MASK], returned[part != MASK])


@pytest.mark.parametrize("step", ["chain", "renoise", "ode"])
def test_the_flow_shows_every_forward(tiny_llada, step):
    student = NoisyMaskStudent(tiny_llada(), adapter="prefix+mask_noise", prompt_length=3, hidden_size=8, rank=4).eval()
    torch.nn.init.eye_(student.mask_noise.weight)
    decoder = NoisyMaskDecoder(student, 4, step=step)
    returned, seen = called_back(decoder)
    assert decoder.refines
    assert [part.shape for part in seen] == [returned.shape] * 4
    assert torch.equal(seen[-1], returned)
    assert not torch.equal(seen[0], returned)  # and they are not all the last one


def test_one_forward_is_one_refinement(tiny_llada):
    student = PrefixStudent(tiny_llada(), prompt_length=3, hidden_size=8, rank=4).eval()
    returned, seen = called_back(OneStepDecoder(student, temperature=1.0))
    assert len(seen) == 1
    assert torch.equal(seen[0], returned)
