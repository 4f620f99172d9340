"""A noisy-mask module of a few weights on the tiny corpus."""

import torch

from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule

ALL = {"adapt": {"share": 0.4, "lr": 1e-2}, "flow": {"share": 0.3, "lr": 1e-2}, "polish": {"share": 0.3, "lr": 1e-2}}


def build(tiny_llada, data, **options):
    torch.manual_seed(0)
    ids = data.tokenizer
    teacher = tiny_llada(
        len(ids), mask_token_id=ids.mask_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    settings = {"prompt_length": 3, "prompt_hidden_size": 8, "prompt_rank": 4, "stages": ALL, "ode_steps": 4}
    settings |= {"forwards": (1, 2), "student_forwards": (1, 2), "ode_forwards": (2,), "pair_reuse": 2}
    return NoisyMaskFlowModule(teacher, **(settings | options))


def perturb(module, size=0.3):
    """Move the student away from its start, where much is zero."""
    with torch.no_grad():
        for p in module.student.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))
    module.student.soft_prompt.project_weights()


def exact_denoiser(student, data, rows, z, s):
    """D_s (B, R, V) of the corpus itself at points z of rows' responses, float64."""
    return data.seen_marginals(rows, student.path.evidence(z[:, data.prompt_length :], s.unsqueeze(-1)))
