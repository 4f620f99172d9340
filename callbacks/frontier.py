"""Ends a run with a record, a table, a figure and sample texts of what `trainer.test` generated."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.markup import escape
from torch import Tensor

from models.functional.next_token import EndIds, until_end
from models.functional.ranks import gathered
from reporting.alpha_figure import alpha_figure
from reporting.console import from_here, report_console
from reporting.figure import has_quality, quality_figure
from reporting.hparams import headline, hyperparameters
from reporting.record import build_record, current_commit, write_record
from reporting.samples import Sample, as_records, print_samples, samples_markdown
from reporting.sentences import in_words, summary
from reporting.table import markdown_table, nfe_cell, results_table, split_rows
from reporting.tpf_figure import aup_of, tpf_curves, tpf_figure


class FrontierReport(Callback):
    """Writes record.json and frontier.png to `folder`, prints the table, and sends all of it to TensorBoard.

    The last line says what happened. There is no frontier.png where no texts were scored. Where a method has several
    decoders, tpf.png as well: quality over tokens per forward pass. Of q*, alpha.png: both divergences over α.

    experiment, config: of the run, for its record. samples: how many texts of each decoder to print and to keep in the record.
    """

    def __init__(self, folder: str | Path, experiment: str, config: dict[str, Any], samples: int = 3) -> None:
        self.folder, self.experiment, self.config, self.samples = Path(folder), experiment, config, samples
        self.record: dict[str, Any] | None = None
        self.commit = current_commit()  # files may change while the run goes on
        self._reset()

    def _reset(self) -> None:
        self._rows: list[dict[str, Tensor]] = []
        self._responses: dict[int, list[Tensor]] = defaultdict(list)
        self._seconds: dict[int, list[float]] = defaultdict(list)
        self._decoders: list[Any] = []
        self._flops: list[float | None] = []
        self._single: list[Any] = []
        self._peaks: dict[int, list[int | None]] = defaultdict(list)
        self._passes: dict[int, list[Tensor]] = defaultdict(list)
        self._batch_passes: dict[int, list[int]] = defaultdict(list)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if not outputs["results"]:  # a corpus without prompts has nothing to answer
            return
        self._rows.append({name: column.cpu() for name, column in batch.items()})
        if not self._decoders:
            self._decoders = [result.decoder for result in outputs["results"]]
            self._flops = [result.flops_per_token for result in outputs["results"]]
            self._single = [result.single for result in outputs["results"]]
        for k, result in enumerate(outputs["results"]):
            self._responses[k].append(result.responses.cpu())
            self._seconds[k].append(result.seconds)
            self._peaks[k].append(result.peak_memory_bytes)
            passes = result.forward_passes.cpu()
            self._passes[k].append(passes)
            self._batch_passes[k].append(int(passes.max()) if result.batch_passes is None else result.batch_passes)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        known_of_model = pl_module.model_figures()
        parts = pl_module.record_parts()
        known = [pl_module.decoder_figures(k) for k in range(len(self._decoders))]
        rows = (
            gathered({name: torch.cat([r[name] for r in self._rows]) for name in self._rows[0]}) if self._rows else {}
        )
        responses = [gathered({"r": torch.cat(self._responses[k])})["r"] for k in range(len(self._decoders))]
        passes = [gathered({"n": torch.cat(self._passes[k])})["n"] for k in range(len(self._decoders))]
        if not trainer.is_global_zero:
            return
        table_rows = [
            self._row(k, data.scorer(rows, texts), texts, passes[k], known[k], data)
            for k, texts in enumerate(responses)
        ]
        if known_of_model:
            table_rows.append(_model_row(pl_module, known_of_model))
        seed = int(getattr(pl_module, "seed", 0))
        self.record = build_record(
            self.experiment, seed, pl_module.device, self.config, data.facts(), table_rows, self.commit
        )
        self.record |= parts
        if (aup := aup_of(self.record)) is not None:
            self.record["aup"] = aup
        texts = self._texts(data, rows, responses, [row["nfe"] for row in table_rows]) if rows else []
        if texts:
            self.record["texts"] = as_records(texts)
        possible = {
            "frontier": quality_figure(self.record) if has_quality(self.record) else None,
            "tpf": tpf_figure(tpf_curves([self.record])),
            "alpha": alpha_figure(self.record),
        }
        figures = {name: figure for name, figure in possible.items() if figure is not None}
        if not trainer.fast_dev_run:
            write_record(self.record, self.folder / "record.json")
            for name, figure in figures.items():
                figure.savefig(self.folder / f"{name}.png", dpi=130)
        console = report_console()
        print_samples(console, texts)
        for part in split_rows(self.record):
            console.print()
            console.print(results_table(part, console.width))
        for sentence in in_words(self.record):
            console.print(f"· {escape(sentence)}", highlight=False)
        conclusion = summary(table_rows)
        if conclusion is not None:
            drawn = "frontier" in figures and not trainer.fast_dev_run
            picture = f" Figure: {from_here(self.folder / 'frontier.png')}" if drawn else ""
            console.print(f"\n[bold]{escape(conclusion)}[/]{escape(picture)}", highlight=False, soft_wrap=True)
        tables = "\n\n".join(markdown_table(part) for part in split_rows(self.record))
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_figure"):
                for name, figure in figures.items():
                    logger.experiment.add_figure(name, figure, trainer.global_step)
                logger.experiment.add_text("results", tables, trainer.global_step)
                logger.experiment.add_text("samples", samples_markdown(texts), trainer.global_step)
                logger.log_hyperparams(hyperparameters(self.config), headline(self.record))

    def _row(
        self, k: int, score: Any, responses: Tensor, passes: Tensor, known: dict[str, dict], data: Any
    ) -> dict[str, Any]:
        ends = data.end_ids()
        decoder, seconds = self._decoders[k], self._seconds[k]
        counts = [r.numel() if data.end_padding else int(until_end(r, ends).sum()) for r in self._responses[k]]
        warm = slice(1, None) if len(seconds) > 1 else slice(None)  # the first batch pays for warming up
        batch, single = len(self._responses[k][0]), self._single[k]
        # the last batch may be a smaller one
        whole = [n for n, r in enumerate(self._responses[k]) if len(r) == batch]
        warm_whole = whole[1:] or whole
        return {
            "method": decoder.method,
            "decoder": decoder.name,
            "nfe": decoder.forwards if bool((passes == decoder.forwards).all()) else passes.double().mean().item(),
            "quality": score.quality | known["quality"],
            "entropy": score.entropy,
            "distinct": score.distinct,
            "cost": {
                "tokens_per_forward": tokens_per_forward(responses, passes, ends),
                "tokens_per_s": sum(counts[warm]) / sum(seconds[warm]) if decoder.forwards else None,
                "flops_per_token": self._flops[k],
                "peak_memory_bytes": max((peak for peak in self._peaks[k] if peak is not None), default=None),
                "batch": batch,
                "seconds_per_batch": fmean(seconds[n] for n in warm_whole) if decoder.forwards else None,
                "nfe_per_batch": fmean(self._batch_passes[k][n] for n in whole) if decoder.forwards else None,
                "seconds_alone": None if single is None else single.seconds,
                "first_token_seconds": None if single is None else single.first_token_seconds,
                **known["cost"],
            },
            "n_samples": len(responses),
            "ci95": {name: list(interval) for name, interval in score.ci95.items()},
        }

    def _texts(self, data: Any, rows: dict[str, Tensor], responses: list[Tensor], passes: list[float]) -> list[Sample]:
        """(decoder, prompt, response, fault) of the first prompts; of several teachers the first and the last alone.

        passes: the forward passes of a text, of each decoder, as in the table.
        """
        few = {name: column[: self.samples] for name, column in rows.items()}
        prompts = data.decode_prompts(few)
        teachers = [k for k, decoder in enumerate(self._decoders) if decoder.method == "teacher"]
        shown = [k for k in range(len(self._decoders)) if k not in teachers[1:-1]]
        texts = []
        for k in shown:
            decoder, answers = self._decoders[k], responses[k][: self.samples]
            name = f"{decoder.name}, NFE {nfe_cell(passes[k])}" if passes[k] else decoder.name
            for n, answer in enumerate(data.decode_responses(answers)):
                faults = data.explain(answers[n], few["reveal"][n]) if hasattr(data, "explain") else []
                texts.append((name, prompts[n], answer, "; ".join(faults[:1])))
        return texts


def tokens_per_forward(responses: Tensor, passes: Tensor, end_ids: EndIds) -> float | None:
    """TPF: tokens of responses (N, R) up to their first end token, that one included, over all forward passes (N,)."""
    total = int(passes.sum())
    return int(until_end(responses, end_ids).sum()) / total if total else None


def _model_row(pl_module: LightningModule, figures: dict[str, float]) -> dict[str, Any]:
    """The row of what is known of the model itself, in the shape of a decoder's."""
    cost = {"tokens_per_s": None, "flops_per_token": None, "peak_memory_bytes": None, "batch": None}
    cost |= pl_module.model_cost() if hasattr(pl_module, "model_cost") else {}
    trained = getattr(pl_module, "objective", pl_module)
    named = {"method": "model", "decoder": type(trained).__name__, "nfe": 0}
    named |= {"quality": figures, "curve": getattr(pl_module, "curve", {})}
    return {**named, "entropy": None, "distinct": None, "cost": cost, "n_samples": None, "ci95": {}}
