"""Measures a noisy-mask student while it trains. Is the noise used? Are the jumps consistent? When are tokens decided?

Where the corpus' own denoiser is known: how far is the student's denoiser from it?
docs/meanflow.md gives each figure's healthy range.
"""

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Generator, Tensor

from models.functional.monitor import distinct_share, noise_information, plug_in_entropy
from models.functional.noisy_mask import distribution_divergence
from models.functional.rows import response_columns
from models.interfaces.probes import FlowMapProbe, find_probe


class FlowMonitor(Callback):
    """Logs after each validation, with the averaged weights. Every rank takes part: forward passes may be collective.

    It reads the `FlowMapProbe` of a module whose `averaged()` is a context with the averaged weights.
    prompts, noises: how many prompts are answered with how many noises each. rows: held-out rows that are used.
    times: s at which the denoiser is measured.
    """

    def __init__(
        self,
        prompts: int = 4,
        noises: int = 64,
        rows: int = 128,
        times: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9),
    ) -> None:
        self.prompts, self.noises, self.rows, self.times = prompts, noises, rows, tuple(times)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        probe = find_probe(pl_module, FlowMapProbe)
        if trainer.sanity_checking or probe is None:
            return
        columns = trainer.datamodule.rows["val"].columns
        held_out = {name: column[: self.rows].to(pl_module.device) for name, column in columns.items()}
        generator = Generator(device=pl_module.device).manual_seed(0)
        with pl_module.averaged():
            figures = self._diversity(trainer, probe, held_out, generator)
            figures |= self._denoiser(trainer, probe, held_out, generator)
            figures["consistency_gap"] = probe.consistency_gap(held_out, generator)
        for name, value in figures.items():
            pl_module.log(f"monitor/{name}", value, sync_dist=True)

    def charts(self) -> dict[str, list[str]]:
        return {
            "use of the noise": ["monitor/noise_information.*", "monitor/entropy_of_all$"],
            "consistency of jumps": ["monitor/consistency_gap$"],
            "decoding accuracy": ["monitor/accuracy_at_.*"],
            "distance from the exact denoiser": ["monitor/denoiser_gap_at_.*"],
        }

    def _diversity(
        self, trainer: Trainer, probe: FlowMapProbe, rows: dict[str, Tensor], generator: Generator
    ) -> dict[str, float]:
        few = {name: column[: self.prompts].repeat_interleave(self.noises, 0) for name, column in rows.items()}
        texts = probe.answer(few, generator).view(-1, self.noises, response_columns(few["response_mask"]))
        figures = {"noise_information": noise_information(texts), "distinct": distinct_share(texts)}
        truth = getattr(trainer.datamodule, "sample_truth", None)
        if truth is not None:  # the same estimator on as many texts of the corpus itself
            same = truth(few, generator).view(texts.shape)
            figures["noise_information_truth"] = noise_information(same)
        figures["entropy_of_all"] = plug_in_entropy(texts.flatten(0, 1))
        return figures

    def _denoiser(
        self, trainer: Trainer, probe: FlowMapProbe, rows: dict[str, Tensor], generator: Generator
    ) -> dict[str, float]:
        """How often D_s is right, and how far it is from the corpus' own denoiser where that is known."""
        figures: dict[str, float] = {}
        exact = getattr(trainer.datamodule, "seen_marginals", None)
        for time in self.times:
            points, logits, tokens = probe.denoised(rows, time, generator)
            figures[f"accuracy_at_{time:g}"] = (logits.argmax(-1) == tokens).float().mean().item()
            if exact is not None and time < 1:
                truth = exact(rows, probe.evidence(points, time)).flatten(0, 1).to(logits.device)
                gap = distribution_divergence(truth, logits.double()).sum() / len(points)
                figures[f"denoiser_gap_at_{time:g}"] = gap.item()
        return figures
