"""Decoders that sample from the exact distribution: the scores of the best possible and of the best factorised model."""

import torch
from torch import Generator, Tensor

from datamodules.controls import on_cpu
from datamodules.oracle.distribution import OracleDistribution


class ProductOfMarginals:
    """Every position sampled from its exact p(x_l | c) on its own: the optimum of models that factorise over positions."""

    name, method, forwards = "product of marginals", "control", 0

    def __init__(self, distribution: OracleDistribution) -> None:
        self.distribution = distribution

    def __call__(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        marginals = self.distribution.marginals(rows["reveal"].cpu())
        drawn = torch.multinomial(marginals.flatten(0, 1), 1, generator=on_cpu(generator))
        return drawn.view(marginals.shape[:2]).to(rows["input_ids"].device)


class ResamplingFloor:
    """Texts sampled from the corpus itself: the score of a perfect model with as many samples."""

    name, method, forwards = "resampling floor", "control", 0

    def __init__(self, distribution: OracleDistribution) -> None:
        self.distribution = distribution

    def __call__(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        texts = self.distribution.sample_continuations(rows["reveal"].cpu(), on_cpu(generator))
        return texts.to(rows["input_ids"].device)
