"""QStarDecodingModule: exact texts of q*, the mixture of two models, and training of π_θ toward it.

Legend: B batch, R response columns, M positions that count, V vocabulary.
"""

from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_modules.base import LeapModule
from models.backbones.autoregressive import AutoregressiveDecoder, generate_autoregressive
from models.backbones.causal_lm import save_causal, save_merged, with_adapters
from models.functional.errors import UsageError
from models.functional.next_token import CausalText, causal_text
from models.functional.rows import response_columns, with_responses
from models.functional.vocabulary import vocabulary_size
from models.interfaces.decoder import Decoder
from models.interfaces.objective import Terms
from models.speculative.alpha_curve import AlphaCurve
from models.speculative.block_drafter import BlockDrafter
from models.speculative.decoder import QStarDecoder, prompts_of
from models.speculative.drafter_files import load_drafter, read_drafter
from models.speculative.exactness import enumeration_error, g_test_of, probable_texts, without_ends
from models.speculative.likelihood import next_token_log_probs
from models.speculative.loss import qstar_terms
from models.speculative.meter import AcceptanceMeter
from models.speculative.options import QStarOptions, Scheme
from models.speculative.probes import PromptProbe

LISTED_TOKENS = 4  # of the texts that a G-test lists where a corpus cannot list its own


class QStarDecodingModule(LeapModule):
    """theta, target: causal models of one vocabulary, π_θ (trained) and π_t (frozen). assistant: a third that may draft.

    options: see `QStarOptions`; changes replace single ones of them.
    """

    options_class: ClassVar[type] = QStarOptions

    def __init__(
        self,
        theta: nn.Module,
        target: nn.Module,
        options: QStarOptions | None = None,
        *,
        assistant: nn.Module | None = None,
        **changes: Any,
    ) -> None:
        options = replace(options or QStarOptions(), **changes)
        if "assistant" in options.schemes and assistant is None:
            raise UsageError("module.schemes names assistant, but there is no third model; type ngram, or give one")
        super().__init__(
            lr=options.lr, weight_decay=options.weight_decay, warmup_steps=options.warmup_steps, seed=options.seed
        )
        self.save_hyperparameters(asdict(options))
        self.options, self.mixture = options, options.mixture
        self.theta = theta if options.lora_rank is None else with_adapters(theta, options.lora_rank)
        self.target, self.assistant = target.requires_grad_(False), assistant
        if options.drafter is not None:
            read_drafter(options.drafter)  # a folder without one is named before long work
        self._loaded: list[BlockDrafter] = []  # no part of the module: it is not trained here
        self._decoders: list[Decoder] = []
        self._meters: dict[int, AcceptanceMeter] = defaultdict(AcceptanceMeter)
        self._alpha_curve = AlphaCurve(options.alpha_points)

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        terms = self._terms(batch, batch_idx, 0)
        self.log("train/loss", terms.loss, prog_bar=True)
        self.log_dict({f"monitor/{name}": value for name, value in terms.raw.items()})
        return self.refuse_nan(terms.loss)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        terms = self._terms(batch, batch_idx, 1)
        figures = {"val/loss": terms.loss} | {f"val/{name}": value for name, value in terms.raw.items()}
        self.log_dict(figures, batch_size=len(batch["input_ids"]), sync_dist=True)
        return terms.loss

    def _terms(self, batch: dict[str, Tensor], batch_idx: int, stream: int) -> Terms:
        # 1. texts that π_θ generates
        rows = self._with_generated(batch, batch_idx, stream)
        # 2. both models' distributions at every position of them
        text = causal_text(rows)
        theta = self._logp(self.theta, text)  # (M, V)
        with torch.no_grad():
            target = self._logp(self.target, text)
        # 3. q*, and the loss toward it
        terms = qstar_terms(
            self.mixture.tempered(theta), self.mixture.tempered(target), self.mixture, self.options.loss
        )
        # 4. expected tokens of a draft of four, at independent acceptances
        beta = terms.raw["beta_theta"]
        return Terms(terms.loss, terms.raw | {"accepted_length": 1 + beta + beta**2 + beta**3})

    @torch.no_grad()
    def _with_generated(self, batch: dict[str, Tensor], batch_idx: int, stream: int) -> dict[str, Tensor]:
        """The rows with responses that π_θ generates."""
        generator = self.step_generator(batch_idx, stream)
        options = {"temperature": self.mixture.temperature, "vocab_size": self.vocab_size, "end_ids": self.end_ids}
        return with_responses(batch, generate_autoregressive(self.theta, batch, generator, **options), self.end_ids)

    def _logp(self, model: nn.Module, text: CausalText) -> Tensor:
        """log-probabilities (M, V) at the positions that count, of the tokens that the corpus has."""
        return next_token_log_probs(model, text, self.vocab_size)

    # -- decoding -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule
        self.vocab_size, self.end_ids = vocabulary_size(data.tokenizer), data.end_ids()
        self.probes = (PromptProbe(self.theta, self.vocab_size, self.end_ids),)
        options = {"temperature": self.mixture.temperature, "vocab_size": self.vocab_size, "end_ids": self.end_ids}
        alone = [AutoregressiveDecoder(model, data.response_length, **options) for model in (self.theta, self.target)]
        for decoder, name in zip(alone, ("π_θ alone", "π_t alone"), strict=True):
            decoder.name = name
        self._decoders = [*alone, *(self.decoder(scheme, data) for scheme in self.options.schemes)]
        self._meters.clear()

    def decoder(self, scheme: Scheme, data: Any) -> QStarDecoder:
        """q* decoding of texts of a corpus."""
        return QStarDecoder(
            self.theta, self.target, scheme, self.options.decoding, response_length=data.response_length,
            vocab_size=vocabulary_size(data.tokenizer), end_ids=data.end_ids(),
            assistant=self._block_drafter() if scheme == "block_drafter" else self.assistant,
        )  # fmt: skip

    def _block_drafter(self) -> BlockDrafter:
        """The drafter in the folder of the options, which knows both models as they were before theta is trained here."""
        if not self._loaded:
            assert self.options.drafter is not None
            self._loaded = [load_drafter(self.options.drafter, {"theta": self.theta, "target": self.target})]
        return self._loaded[0]

    def _move_drafter(self) -> None:
        """To the models' device: it is no part of the module, so Lightning does not move it with them."""
        for drafter in self._loaded:
            drafter.to(self.device)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._move_drafter()

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._move_drafter()

    def decoders(self) -> list[Decoder]:
        return self._decoders

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Response ids (B, R) of q*, by the last of the schemes."""
        decoder = self._decoders[-1]
        assert isinstance(decoder, QStarDecoder)
        decoder.outputs.clear()
        return decoder(batch, self.step_generator(batch_idx, stream=2, epoch=0))

    # -- comparison ---------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """The exactness tests of each scheme: both where the corpus can list all texts, else a G-test after one prompt."""
        self._move_drafter()
        self._alpha_curve.reset()
        if not self.options.exactness_samples or self.trainer.fast_dev_run:
            return
        data, n = self.trainer.datamodule, self.options.exactness_samples
        schemes = [(k, decoder) for k, decoder in enumerate(self._decoders) if isinstance(decoder, QStarDecoder)]
        listed = data.list_texts() if hasattr(data, "list_texts") else None
        if listed is not None:
            prompt, texts = (part.to(self.device) for part in listed)
        else:
            prompt = self._first_prompt(data)
            texts = probable_texts(schemes[0][1], prompt, LISTED_TOKENS, max(1, n // 10))  # of q*, whoever drafts
        shown = track(schemes, description="exactness of each scheme") if self.trainer.is_global_zero else schemes
        for k, decoder in shown:
            generator = self.step_generator(k, stream=3, epoch=0)
            tested = decoder if listed is not None else without_ends(decoder)
            found = {"g_test_p": g_test_of(tested, prompt, texts, n, generator)}
            # outcomes of noise cannot be listed
            noisy = self.options.verify == "shared_noise" or getattr(decoder.drafter, "draws_with_noise", False)
            if listed is not None and not noisy:
                found["max_enumeration_error"] = enumeration_error(decoder, prompt)
            self._meters[k].exactness = found

    def _first_prompt(self, data: Any) -> Tensor:
        """(P,) The first test prompt, the same on every rank."""
        prompts, lengths = prompts_of(next(iter(data.test_dataloader())))
        return prompts[0, : int(lengths[0])].to(self.device)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Every decoder's texts, their likelihood under both models, and what the drafts were worth."""
        if self.options.alpha_points:
            self._add_to_curve(batch)
        for decoder in self._decoders:
            if isinstance(decoder, QStarDecoder):
                decoder.outputs.clear()
        step = super().test_step(batch, batch_idx)
        for k, result in enumerate(step["results"]):
            meter = self._meters[k]
            meter.add_texts(*self._nll(batch, result.responses))
            if isinstance(result.decoder, QStarDecoder):
                out = result.decoder.outputs[0]  # later ones only count operations
                meter.add_drafts(out, result.decoder.expected_speedup(out))
                if batch_idx or sum(self.trainer.num_test_batches) == 1:  # the first batch warms up
                    meter.add_time(result.seconds, out)
        return step

    @torch.no_grad()
    def _add_to_curve(self, batch: dict[str, Tensor]) -> None:
        """Both models at every position of the corpus' own texts, up to their ends."""
        text = causal_text(
            with_responses(batch, batch["input_ids"][:, -response_columns(batch["response_mask"]) :], self.end_ids)
        )
        models = (self.theta, self.target)
        self._alpha_curve.add(*(self.mixture.tempered(self._logp(model, text)) for model in models))

    def record_parts(self) -> dict[str, Any]:
        curve = self._alpha_curve.record(self._sum_over_ranks)
        return {"alpha_curve": curve} if curve else {}

    @torch.no_grad()
    def _nll(self, batch: dict[str, Tensor], responses: Tensor) -> tuple[Tensor, Tensor]:
        """-log p of responses under both models, nats, one figure for each token up to the end."""
        text = causal_text(with_responses(batch, responses, self.end_ids))
        tokens = text.targets[text.weights].unsqueeze(-1)
        theta, target = (-self._logp(model, text).gather(-1, tokens).squeeze(-1) for model in (self.theta, self.target))
        return theta, target

    def decoder_figures(self, k: int) -> dict[str, dict[str, float | None]]:
        """The texts' likelihood under both models, whether the scheme is exact, and what its drafts were worth."""
        meter = self._meters[k]
        totals = meter.sum_over_ranks(self._sum_over_ranks)
        naive = [i for i, decoder in enumerate(self._decoders) if getattr(decoder, "scheme", None) == "naive"]
        cost = meter.cost(totals, self._meters[naive[0]] if naive else None)
        return {"quality": {**meter.quality(totals)}, "cost": cost}

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.gathered(own).sum(0).tolist()

    # -- files --------------------------------------------------------------------------------------------------------

    def export(self, folder: str | Path, tokenizer: Any = None, merged: bool = False) -> Path:
        """Write π_θ as a plain folder: its adapter for peft, `merged` or whole for transformers."""
        return (save_merged if merged else save_causal)(self.theta, folder, tokenizer)
