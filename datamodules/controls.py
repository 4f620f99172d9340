"""Decoders that read the corpus instead of a model: the scores of texts that no model generated."""

import torch
from torch import Generator, Tensor

from models.functional.rows import response_columns


class HeldOutText:
    """The rows' own texts, which are held out: what real text scores."""

    name, method, forwards = "held-out text", "control", 0

    def __call__(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        return rows["input_ids"][:, -response_columns(rows["response_mask"]) :].clone()


class UnigramText:
    """Every position sampled on its own by how often a token occurs: its marginal, as rows are cut anywhere.

    counts: (V,) of the training tokens. around: two ids that every row begins and ends with.
    """

    name, method, forwards = "product of marginals", "control", 0

    def __init__(self, counts: Tensor, around: tuple[int, int] | None = None) -> None:
        self.shares, self.around = counts.double() / counts.sum(), around

    def __call__(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        shape = (len(rows["input_ids"]), response_columns(rows["response_mask"]))
        sampled = torch.multinomial(self.shares, shape[0] * shape[1], replacement=True, generator=on_cpu(generator))
        texts = sampled.view(shape).to(rows["input_ids"].device)
        if self.around is not None:
            texts[:, 0], texts[:, -1] = self.around
        return texts


def on_cpu(generator: Generator) -> Generator:
    """A corpus' tables live on the CPU: a GPU generator hands on a seed instead."""
    if generator.device.type == "cpu":
        return generator
    seed = torch.randint(0, 2**62, (1,), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))
