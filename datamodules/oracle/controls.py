"""Decoders that know the truth: what the best possible and the best factorised generator would score."""

import torch
from torch import Generator, Tensor

from datamodules.controls import on_cpu
from datamodules.oracle.distribution import OracleDistribution


class ProductOfMarginals:
    """Every place drawn from its exact p(x_l | c) on its own: the optimum of any generator that factorises over places."""

    name, method, forwards = "product of marginals", "control", 0

    def __init__(self, distribution: OracleDistribution) -> None:
        self.distribution = distribution

    def __call__(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        marginals = self.distribution.marginals(rows["reveal"].cpu())
        drawn = torch.multinomial(marginals.flatten(0, 1), 1, generator=on_cpu(generator))
        return drawn.view(marginals.shape[:2]).to(rows["input_ids"].device)


class ResamplingFloor:
    """Texts drawn from the corpus itself: what a perfect generator scores with as many samples."""

    name, method, forwards = "resampling floor", "control", 0

    def __init__(self, distribution: OracleDistribution) -> None:
        self.distribution = distribution

    def __call__(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        texts = self.distribution.sample_continuations(rows["reveal"].cpu(), on_cpu(generator))
        return texts.to(rows["input_ids"].device)
