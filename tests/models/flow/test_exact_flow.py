"""The flow itself, on the denoiser that the corpus has: what is missing from a trained one is the training's."""

import pytest
import torch
from helpers.noisy_mask import exact_denoiser

from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.solver import follow_flow
from models.speculative.exactness import g_test

TEXTS = 4000


@pytest.fixture
def student(tiny_llada, tiny_oracle):
    torch.manual_seed(0)
    ids = tiny_oracle.tokenizer
    base = tiny_llada(len(ids), mask_token_id=ids.mask_token_id, eos_token_id=ids.eos_token_id, hidden_size=32)
    return NoisyMaskStudent(base, prompt_length=3, hidden_size=8, rank=4).eval()


def unprompted(data):
    prompt = data.encode_prompts([""])
    return {name: column.expand(TEXTS, *column.shape[1:]).contiguous() for name, column in prompt.items()}


def texts_of_flow(student, data, forwards, alone=False):
    """(N, R) where the flow of the exact denoiser leads; alone: of one in which each position sees itself only."""
    rows = unprompted(data)
    marginals = data.distribution.marginals(rows["reveal"][:1])

    def denoiser(sample, t):
        if alone:
            evidence = student.path.evidence(sample.z[:, data.prompt_length :], sample.s.unsqueeze(-1))
            return (marginals.log() + evidence).flatten(0, 1).float()
        return exact_denoiser(student, data, rows, sample.z, sample.s).log().flatten(0, 1).float()

    start = student.path.start_sample(rows, torch.Generator().manual_seed(0))
    tokens = follow_flow(student.path, denoiser, start, forwards=forwards, step="ode")
    return tokens[:, data.prompt_length :]


def p_value(data, texts):
    """Of a G-test against the corpus' own probabilities; 0 where a text is not one of the corpus."""
    known = data.list_texts()[1]
    reveal = torch.full((len(known), len(data.attribute_names)), -1)
    hits = (texts.unsqueeze(1) == known).all(-1).sum(0)
    return g_test(hits, data.distribution.log_prob(known, reveal).exp()) if hits.sum() == len(texts) else 0.0


def test_the_flow_of_the_exact_denoiser_generates_every_text_as_often_as_the_corpus(student, tiny_oracle):
    assert p_value(tiny_oracle, texts_of_flow(student, tiny_oracle, 8)) > 1e-3
    assert p_value(tiny_oracle, texts_of_flow(student, tiny_oracle, 2)) < 1e-6  # the control: steps that are too long


def test_positions_that_see_themselves_alone_do_not_make_a_text(student, tiny_oracle):
    together = texts_of_flow(student, tiny_oracle, 8)
    alone = texts_of_flow(student, tiny_oracle, 8, alone=True)
    reveal = unprompted(tiny_oracle)["reveal"]
    valid = [tiny_oracle.distribution.log_prob(texts, reveal).isfinite().double().mean() for texts in (together, alone)]
    assert valid[0] > 0.999 > 0.5 > valid[1]
