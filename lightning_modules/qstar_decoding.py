"""QStarDecodingModule: exact texts of q*, the model between two, and training that draws π_θ toward it.

Legend: B batch, R response columns, M places that count, V vocabulary.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_modules.base import LeapModule
from models.backbones.autoregressive import AutoregressiveDecoder, generate_autoregressive
from models.backbones.causal_lm import causal_logits, save_causal, save_merged, with_adapters
from models.functional.errors import UsageError, require_choice
from models.functional.next_token import CausalText, causal_text, until_end
from models.interfaces.decoder import Decoder
from models.interfaces.objective import Terms
from models.speculative.decode import require_draft_length
from models.speculative.decoder import NAMES, Costs, QStarDecoder, Scheme
from models.speculative.distribution import MixtureDist
from models.speculative.exactness import enumeration_error, g_test_of
from models.speculative.loss import QStarLoss, qstar_terms
from models.speculative.probes import PromptProbe
from models.speculative.verification import VERIFICATIONS


class QStarDecodingModule(LeapModule):
    """theta, target: causal models of one vocabulary, π_θ (trained) and π_t (frozen). assistant: a third that may draft.

    theta_weight: α; None is equally far from both. schemes: the ways of drafting that `trainer.test` compares, with gamma
    tokens a draft (`auto` follows the acceptance and the `costs`), checked by `verify`. temperature acts on both models, top_k
    and top_p on q*.
    loss: `kl` or `acceptance`, on texts that π_θ says itself. lora_rank: adapters that train in its place; None trains all.
    exactness_samples: texts for a G-test of each scheme, where the corpus can list all texts; 0 does without.
    """

    def __init__(
        self,
        theta: nn.Module,
        target: nn.Module,
        *,
        assistant: nn.Module | None = None,
        theta_weight: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        schemes: tuple[Scheme, ...] = ("naive", "theta", "target", "alternate", "ngram"),
        gamma: int | Literal["auto"] = "auto",
        verify: Literal["token", "block"] = "token",
        cache: bool = True,
        costs: Costs = "parameters",
        loss: QStarLoss = "kl",
        lora_rank: int | None = None,
        exactness_samples: int = 8192,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps, seed=seed)
        require_choice("module.loss", loss, get_args(QStarLoss))
        for scheme in schemes:
            require_choice("module.schemes", scheme, NAMES)
        if not schemes:
            raise UsageError("module.schemes is empty; type for example module.schemes=[alternate]")
        require_choice("module.verify", verify, VERIFICATIONS)
        require_draft_length("module.gamma", gamma)
        require_choice("module.costs", costs, get_args(Costs))
        if "assistant" in schemes and assistant is None:
            raise UsageError("module.schemes names assistant, but there is no third model; type ngram, or give one")
        self.save_hyperparameters(ignore=["theta", "target", "assistant"])
        self.mixture = MixtureDist(theta_weight, temperature, top_k, top_p)
        self.theta = theta if lora_rank is None else with_adapters(theta, lora_rank)
        self.target, self.assistant = target.requires_grad_(False), assistant
        self.schemes, self.gamma, self.verify, self.cache = tuple(schemes), gamma, verify, cache
        self.costs, self.loss, self.exactness_samples = costs, loss, exactness_samples
        self._decoders: list[Decoder] = []
        self._sums: dict[int, dict[str, float]] = {}

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
        # 1. texts of π_θ's own
        rows = self._said_by_theta(batch, batch_idx, stream)
        # 2. both models' distributions at every place of them
        text = causal_text(rows)
        theta = self._logp(self.theta, text)  # (M, V)
        with torch.no_grad():
            target = self._logp(self.target, text)
        # 3. q* between them, and the loss toward it
        terms = qstar_terms(self.mixture.tempered(theta), self.mixture.tempered(target), self.mixture, self.loss)
        # 4. tokens that a draft of four yields, if each is kept with the same chance
        beta = terms.raw["beta_theta"]
        return Terms(terms.loss, terms.raw | {"accepted_length": sum(beta**k for k in range(4))})

    @torch.no_grad()
    def _said_by_theta(self, batch: dict[str, Tensor], batch_idx: int, stream: int) -> dict[str, Tensor]:
        generator = self.step_generator(batch_idx, stream)
        options = {"temperature": self.mixture.temperature, "vocab_size": self.words, "eos_id": self.eos_id}
        return self._with_responses(batch, generate_autoregressive(self.theta, batch, generator, **options))

    def _with_responses(self, batch: dict[str, Tensor], said: Tensor) -> dict[str, Tensor]:
        """The rows with other responses (B, R), of which what stands beyond the end token does not count."""
        columns = said.shape[1]
        ids, counts = batch["input_ids"].clone(), batch["response_mask"].clone()
        ids[:, -columns:] = said
        counts[:, -columns:] = until_end(said, self.eos_id)
        return {**batch, "input_ids": ids, "response_mask": counts}

    def _logp(self, model: nn.Module, text: CausalText) -> Tensor:
        """log-probabilities (M, V) of the places that count, of the words that the corpus has."""
        return causal_logits(model, text)[text.weights][..., : self.words].float().log_softmax(-1)

    # -- decoding -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule
        length = data.response_length
        self.words, self.eos_id = len(data.tokenizer), data.tokenizer.eos_token_id
        self.probes = (PromptProbe(self.theta, self.words, self.eos_id),)
        plain = []
        for model, name in zip(self._pair, ("π_θ alone", "π_t alone"), strict=True):
            plain.append(
                AutoregressiveDecoder(
                    model, length, temperature=self.mixture.temperature, vocab_size=self.words, eos_id=self.eos_id
                )
            )
            plain[-1].name = name
        self._decoders = [*plain, *(self.decoder(scheme, data) for scheme in self.schemes)]
        self._sums = defaultdict(lambda: defaultdict(float))

    @property
    def _pair(self) -> tuple[nn.Module, nn.Module]:
        return self.theta, self.target

    def decoder(self, scheme: Scheme, data: Any) -> QStarDecoder:
        """q* decoding of texts of a corpus."""
        return QStarDecoder(
            self.theta, self.target, scheme, response_length=data.response_length, vocab_size=len(data.tokenizer),
            eos_id=data.tokenizer.eos_token_id, mixture=self.mixture, gamma=self.gamma, verify=self.verify, cache=self.cache,
            assistant=self.assistant, costs=self.costs,
        )  # fmt: skip

    def decoders(self) -> list[Decoder]:
        return self._decoders

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Response ids (B, R) of q*, by the last of the schemes."""
        decoder = self._decoders[-1]
        decoder.outputs.clear()
        return decoder(batch, self.step_generator(batch_idx, stream=2, epoch=0))

    # -- comparison ---------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        data = self.trainer.datamodule
        listed = data.list_texts() if self.exactness_samples and hasattr(data, "list_texts") else None
        if listed is None or self.trainer.fast_dev_run:
            return
        prompt, texts = (part.to(self.device) for part in listed)
        schemes = [(k, decoder) for k, decoder in enumerate(self._decoders) if isinstance(decoder, QStarDecoder)]
        quiet = not self.trainer.is_global_zero
        for k, decoder in track(schemes, description="exactness of each scheme", disable=quiet):
            generator = self.step_generator(k, stream=3, epoch=0)
            self._sums[k]["g_test_p"] = g_test_of(decoder, prompt, texts, self.exactness_samples, generator)
            self._sums[k]["max_enumeration_error"] = enumeration_error(decoder, prompt)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Every decoder's texts, how likely each model finds them, and what the drafts were worth."""
        for decoder in self._decoders:
            if isinstance(decoder, QStarDecoder):
                decoder.outputs.clear()
        step = super().test_step(batch, batch_idx)
        for k, result in enumerate(step["results"]):
            sums = self._sums[k]
            for name, nll in zip(("nll_theta", "nll_target"), self._nll(batch, result.responses), strict=True):
                sums[name] += float(nll.sum())
            sums["tokens"] += nll.numel()
            if isinstance(result.decoder, QStarDecoder):
                out = result.decoder.outputs[0]  # later ones only count operations
                sums["seconds"] += result.seconds if batch_idx or self._one_batch else 0.0
                sums["kept"] += sum(out.kept.values())
                sums["examined"] += sum(out.examined.values())
                expected = result.decoder.expected_speedup(out)
                sums["formula"] += (expected or 0.0) * len(out.tokens)
                sums["rows"] += len(out.tokens)
        return step

    @property
    def _one_batch(self) -> bool:
        return sum(self.trainer.num_test_batches) == 1

    @torch.no_grad()
    def _nll(self, batch: dict[str, Tensor], responses: Tensor) -> tuple[Tensor, Tensor]:
        """-log p of responses under both models, nats, one figure for each token up to the end."""
        text = causal_text(self._with_responses(batch, responses))
        said = text.targets[text.weights].unsqueeze(-1)
        return tuple(-self._logp(model, text).gather(-1, said).squeeze(-1) for model in self._pair)

    def decoder_figures(self, k: int) -> dict[str, dict[str, float | None]]:
        """How likely both models find the texts, whether the scheme is exact, and what its drafts were worth."""
        named = sorted(self._sums[k])
        values = torch.tensor([self._sums[k][name] for name in named], dtype=torch.float64, device=self.device)
        once = ("g_test_p", "max_enumeration_error")
        total = self.all_gather(values).view(-1, len(named)).sum(0).tolist()
        sums = {name: self._sums[k][name] if name in once else value for name, value in zip(named, total, strict=True)}
        quality = {name: sums[name] / sums["tokens"] for name in ("nll_theta", "nll_target")}
        quality |= {name: sums[name] for name in once if name in sums}
        if "rows" not in sums:
            return {"quality": quality, "cost": {}}
        naive = [i for i, d in enumerate(self._decoders) if getattr(d, "scheme", None) == "naive"]
        base = self._sums[naive[0]]["seconds"] if naive else 0.0
        cost = {
            "acceptance": sums["kept"] / sums["examined"] if sums["examined"] else None,
            "speedup_vs_naive": base / self._sums[k]["seconds"] if base and self._sums[k]["seconds"] else None,
            "speedup_formula": sums["formula"] / sums["rows"] or None,
        }
        return {"quality": quality, "cost": cost}

    # -- files --------------------------------------------------------------------------------------------------------

    def export(self, folder: str | Path, tokenizer: Any = None, merged: bool = False) -> Path:
        """Write π_θ as a plain folder: its adapter for peft, `merged` or whole for transformers."""
        return (save_merged if merged else save_causal)(self.theta, folder, tokenizer)
