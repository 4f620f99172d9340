"""A tiny noisy-mask student, a batch for it, and its answer."""

import torch

from models.flow.noisy_mask_student import NoisyMaskStudent


def build(tiny_llada, adapter="full", **options):
    torch.manual_seed(0)
    sizes = {"prompt_length": 3, "hidden_size": 8, "rank": 4, "lora_rank": 2}
    return NoisyMaskStudent(tiny_llada(), adapter=adapter, **(sizes | options))


def rows():
    input_ids = torch.randint(3, 11, (4, 6), generator=torch.Generator().manual_seed(1))
    response = torch.zeros(4, 6, dtype=torch.bool)
    response[:, 2:] = True
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(response), "response_mask": response}


def psi(student, batch, s=0.0, t=0.0, seed=0):
    start = student.path.start_sample(batch, torch.Generator().manual_seed(seed))
    return student(start._replace(s=start.s + s), start.s + t)


def same_base(student, tiny_llada):
    base = tiny_llada()
    base.load_state_dict(student.base.state_dict())
    return base
