"""A whole response in one forward pass of the student: r = 0, t = 1, every response token masked."""

import torch
from torch import Generator, Tensor

from models.flow.prefix_student import PrefixStudent
from models.functional.gumbel import sample_categorical
from models.functional.rows import response_columns
from models.interfaces.decoder import TokenCallback


@torch.no_grad()
def generate_one_step(student: PrefixStudent, rows: dict[str, Tensor], generator: Generator, temperature: float = 0.0):
    """Responses (B, R): the argmax of u(x_1, 0, 1) at every position, or an independent draw from each."""
    base, response_mask = student.base, rows["response_mask"]
    xt = torch.where(response_mask, base.mask_id, rows["input_ids"])
    r = torch.zeros(len(xt), device=xt.device)
    hidden = student.hidden(base.embed(xt), rows["attention_mask"], r, torch.ones_like(r), response_mask)
    logits = base.lm_head(hidden[:, -response_columns(response_mask) :])
    logits[..., base.mask_id] = float("-inf")
    return sample_categorical(logits, temperature, generator)


class OneStepDecoder:
    """`generate_one_step` as a `Decoder`."""

    method = "student"
    forwards = 1
    refines = True

    def __init__(self, student: PrefixStudent, *, temperature: float = 0.0) -> None:
        self.student, self.temperature = student, temperature
        self.name = f"student, {'greedy' if temperature == 0 else 'sampled'}"

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        responses = generate_one_step(self.student, rows, generator, self.temperature)
        if on_tokens is not None:
            on_tokens(responses)
        return responses
