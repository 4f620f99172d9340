"""BlockDraftModule: a small network that drafts a block of tokens in one forward pass, for one causal model or for q* of two.

Legend: B batch, L columns, R response columns, k tokens of a draft.
"""

from collections import defaultdict
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from lightning_modules.base import LeapModule
from models.functional.block_draft import Survival
from models.functional.errors import UsageError
from models.functional.next_token import CausalText, causal_text
from models.functional.ranks import summed
from models.functional.rows import prompted_rows, response_columns, with_responses
from models.functional.vocabulary import most_frequent, token_counts, vocabulary_size
from models.interfaces.decoder import Decoder
from models.speculative.block_drafter import BlockDrafter
from models.speculative.block_options import BlockDraftOptions
from models.speculative.block_training import BlockTerms, Read, block_terms, blocks_at, draw_anchors, read_texts
from models.speculative.decoder import QStarDecoder
from models.speculative.draft_totals import DraftTotals
from models.speculative.drafter_files import load_drafter, save_drafter
from models.speculative.options import Scheme
from models.speculative.state import QStarOutput
from models.speculative.text_pool import TextPool

COUNTED_BATCHES = 512  # whose tokens are counted for `draft_vocabulary`
TRAINING_STREAM, VALIDATION_STREAM, SERVED_STREAM = 0, 1, 2


class BlockDraftModule(LeapModule):
    """model: the causal model that is drafted for; or theta and target, for q* of both. All stay frozen.

    options: see `BlockDraftOptions`; changes replace single ones of them.
    A step's texts are drawn from the target itself (texts=target), and its blocks begin behind random anchors. Validation logs
    the expected accepted length of such blocks (`val/accepted_length`), what decoding accepts (`val/served_length`), and what
    the training figure says at the very anchors that decoding had (`val/length_at_served`). With verify=token and texts of the
    target the last two agree but for sampling noise.
    """

    options_class: ClassVar[type] = BlockDraftOptions
    rank_dependent_reason = "every rank generates texts until its own have ended; type module.texts=data"

    def __init__(
        self,
        model: nn.Module | None = None,
        options: BlockDraftOptions | None = None,
        *,
        theta: nn.Module | None = None,
        target: nn.Module | None = None,
        **changes: Any,
    ) -> None:
        options = replace(options or BlockDraftOptions(), **changes)
        super().__init__(
            lr=options.lr, weight_decay=options.weight_decay, warmup_steps=options.warmup_steps, seed=options.seed
        )
        self.save_hyperparameters(asdict(options))
        self.options = options
        first, second = (model, model) if theta is None else (theta, target)
        if first is None or second is None:
            raise UsageError("a block drafter needs one causal model, or both theta and target of q*")
        self.theta, self.target = first.requires_grad_(False), second.requires_grad_(False)
        alone = first is second
        self.verifiers: dict[str, nn.Module] = {"theta": first} | ({} if alone else {"target": second})
        # one model is q* of itself at any weight
        self.mixture = replace(options.mixture, theta_weight=1.0) if alone else options.mixture
        self.drafter = BlockDrafter(self.verifiers, options.drafter, second.config.get_text_config().vocab_size)
        self._pool = TextPool(options.pool_size, options.pool_keeps)
        self._proposed_known = options.draft_vocabulary is None
        self._decoders: list[QStarDecoder] = []
        self._totals: dict[int, DraftTotals] = defaultdict(DraftTotals)  # by decoder, over the batches of a test
        self._expected = torch.zeros(2)  # accepted tokens by the training figure, and drafts, of a test
        self._packed = False  # whether the test rows have no prompts of their own

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        generator = self.step_generator(batch_idx, TRAINING_STREAM)
        # 1. texts of the target, and what the verifiers make of them
        turn = self._turn(batch_idx)
        rows = self._pool.rows(turn, lambda: self._with_texts(prompted_rows(batch), generator))
        text = causal_text({name: column.to(self.device) for name, column in rows.items()})
        read = self._pool.read(turn, lambda: self._read(text))
        # 2. blocks behind random anchors, and their loss
        terms = self._terms(text, read, *draw_anchors(text, self.options.anchors, generator), generator)
        # 3. figures
        self.log("train/loss", terms.loss.loss, prog_bar=True)
        self.log("train/accepted_length", _length(terms.survival, terms.drafts), prog_bar=True)
        self.log_monitors({"ce": terms.loss.ce, "tv": terms.loss.tv, **_by_position("accept", terms.survival)})
        return self.refuse_nan(terms.loss.loss)

    def _turn(self, batch_idx: int) -> int:
        """The number of a micro-batch since the start of training."""
        parts = self.trainer.accumulate_grad_batches
        return self.global_step * parts + batch_idx % parts

    def _read(self, text: CausalText) -> Read:
        self._freeze_modes()
        return read_texts(self.verifiers, self.drafter, self.mixture, text)

    def _terms(
        self,
        text: CausalText,
        read: Read,
        row: Tensor,
        anchor: Tensor,
        generator: Generator,
        scored: Tensor | None = None,
    ) -> BlockTerms:
        o = self.options
        blocks = blocks_at(text, row, anchor, o.draft_length, scored)
        return block_terms(self.drafter, read, text, blocks, self.mixture, generator, ce=o.ce, tv=o.tv, decay=o.decay)

    def _freeze_modes(self) -> None:
        """Verifiers run without dropout, as they do where the drafter is used."""
        for model in self.verifiers.values():
            model.eval()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self._proposed_known:
            self.drafter.propose_only(self._frequent_tokens())
            self._proposed_known = True

    def _frequent_tokens(self) -> Tensor:
        """Of the first training batches of all ranks, prompts included."""
        found = map(prompted_rows, islice(self.trainer.datamodule.train_dataloader(), COUNTED_BATCHES))
        ids = (rows["input_ids"][rows["attention_mask"].bool() | rows["response_mask"]] for rows in found)
        counts = summed(token_counts(ids, self.drafter.vocab_size).to(self.device))
        return most_frequent(counts)[: self.options.draft_vocabulary]

    # -- texts --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _with_texts(self, rows: dict[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The rows with responses of the target, or with their own where texts=data; scored up to the first end token."""
        columns = response_columns(rows["response_mask"])
        if self.options.texts == "data":
            return with_responses(rows, rows["input_ids"][:, -columns:], self.end_ids)
        decoder = self.decoder("naive", columns)
        return with_responses(rows, decoder(rows, generator), self.end_ids)

    # -- validation: the training figure, and what decoding makes of the same weights ---------------------------------

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        generator = self.step_generator(batch_idx, VALIDATION_STREAM, epoch=0)
        rows = {name: column[: self.options.served_rows] for name, column in prompted_rows(batch).items()}
        # 1. the training figure, behind random anchors
        text = causal_text(self._with_texts(rows, generator))
        terms = self._terms(text, self._read(text), *draw_anchors(text, self.options.anchors, generator), generator)
        figures: dict[str, Tensor | float] = {
            "loss": terms.loss.loss,
            "accepted_length": _length(terms.survival, terms.drafts),
            **_by_position("accept", terms.survival),
        }
        # 2. what is served, and the training figure behind the anchors of that
        served = self._served(rows, self.step_generator(batch_idx, SERVED_STREAM, epoch=0))
        self.log_dict(
            {f"val/{name}": value for name, value in (figures | served).items()},
            batch_size=len(rows["input_ids"]), sync_dist=True,
        )  # fmt: skip
        return terms.loss.loss

    @torch.no_grad()
    def _served(self, rows: dict[str, Tensor], generator: Generator) -> dict[str, Tensor | float]:
        """Figures of decoding the prompts of the rows, the same names on every rank: 0 where nothing was drafted."""
        columns = response_columns(rows["response_mask"])
        decoder = self.decoder("block_drafter", columns)
        responses = decoder(rows, generator)
        out = decoder.outputs[0]
        expected: Tensor | float = 0.0
        if out.draft_starts is not None:
            terms = self._at_served(rows, responses, out, generator)
            expected = _length(terms.survival, terms.drafts)
        totals = out.totals
        shares = [*totals.acceptance_at, *[0.0] * self.options.draft_length][: self.options.draft_length]
        served = {f"served_{k + 1}": share for k, share in enumerate(shares)}
        return {
            "served_length": totals.accepted_length,
            "length_at_served": expected,
            "tokens_per_verifier_forward": totals.tokens_per_forward,
            **served,
        }

    @torch.no_grad()
    def _at_served(
        self, rows: dict[str, Tensor], responses: Tensor, out: QStarOutput, generator: Generator
    ) -> BlockTerms:
        """The training figure behind the anchors that decoding had, on the texts that it wrote, of as many tokens a draft."""
        assert out.draft_starts is not None
        text = causal_text(with_responses(rows, responses, self.end_ids))
        row, start = out.draft_starts.unbind(-1)
        # the last committed token is one before the draft, and the inputs of a causal model are one column shorter
        anchor = text.ids.shape[1] - responses.shape[1] + start
        return self._terms(text, self._read(text), row, anchor, generator, out.draft_lengths)

    # -- decoding -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule
        self._settle(data)
        if self._pool.size and self.trainer.world_size > 1:
            raise UsageError("module.pool keeps the texts of one process; type module.pool=0 with several devices")
        self._decoders = [self.decoder(scheme, data.response_length) for scheme in self.options.schemes]
        self._totals.clear()
        self._expected.zero_()

    def _settle(self, data: Any) -> None:
        """What the corpus decides: the vocabulary and the ends of texts. Errors: UsageError for a draft_vocabulary of all."""
        self.end_ids = data.end_ids()
        words = min(self.drafter.vocab_size, vocabulary_size(data.tokenizer))
        some = self.options.draft_vocabulary
        if some is not None and some >= words:
            raise UsageError(
                f"module.draft_vocabulary={some} leaves out none of the {words} tokens; type module.draft_vocabulary=null to "
                "propose all"
            )
        self.drafter.vocab_size = words

    def decoder(self, scheme: Scheme, response_length: int) -> QStarDecoder:
        """Texts of the target, drafted as the scheme says."""
        how = replace(self.options.decoding, mixture=self.mixture)
        decoder = QStarDecoder(
            self.theta, self.target, scheme, how, response_length=response_length, vocab_size=self.drafter.vocab_size,
            end_ids=self.end_ids, assistant=self.drafter if scheme == "block_drafter" else None,
        )  # fmt: skip
        if self.theta is self.target:
            decoder.name = decoder.name.replace("q*", "one model").replace("both", "it runs")
        return decoder

    def decoders(self) -> list[Decoder]:
        return list(self._decoders)

    def answering(self, data: Any, folder: str | Path) -> QStarDecoder:
        """The decoder of a saved drafter, for prompts of a corpus."""
        self._settle(data)
        self.drafter = load_drafter(folder, self.verifiers)
        return self.decoder("block_drafter", data.response_length)

    # -- comparison ---------------------------------------------------------------------------------------------------

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Every scheme's texts, and what its drafts were worth."""
        self._freeze_modes()
        self._packed = "response_mask" not in batch
        if self._packed:
            self._totals[len(self._decoders) - 1] += self._decode_halves(batch, batch_idx).totals
            return {"results": []}
        for decoder in self._decoders:
            decoder.outputs.clear()
        step = super().test_step(batch, batch_idx)
        for k, decoder in enumerate(self._decoders):
            out = decoder.outputs[0]  # later ones only count operations
            self._totals[k] += out.totals
            if decoder.scheme == "block_drafter" and out.draft_starts is not None:
                generator = self.step_generator(batch_idx, SERVED_STREAM, epoch=0)
                terms = self._at_served(prompted_rows(batch), step["results"][k].responses, out, generator)
                self._expected += torch.tensor([float(terms.survival.accepted.sum()), float(terms.drafts)])
        return step

    def _decode_halves(self, batch: dict[str, Tensor], batch_idx: int) -> QStarOutput:
        """The second half of each row, drafted after the first, by the last of the schemes."""
        rows = prompted_rows(batch)
        decoder = self.decoder(self.options.schemes[-1], response_columns(rows["response_mask"]))
        decoder(rows, self.step_generator(batch_idx, SERVED_STREAM, epoch=0))
        return decoder.outputs[0]

    def decoder_figures(self, k: int) -> dict[str, dict[str, float | None]]:
        found = self._totals[k].figures()
        names = ("acceptance", "tokens_per_verifier_forward", "accepted_length")
        cost: dict[str, float | None] = {name: found[name] for name in names if name in found}
        return {"quality": {}, "cost": cost}

    def model_figures(self) -> dict[str, float]:
        """Of packed text, which has no row of a decoder: what the drafts of continuations were worth."""
        if not self._packed:
            return {}
        return {"accepted_length": self._totals[len(self._decoders) - 1].accepted_length}

    def model_cost(self) -> dict[str, float | None]:
        return self.decoder_figures(len(self._decoders) - 1)["cost"] if self._packed else {}

    def record_parts(self) -> dict[str, Any]:
        """`drafts`: of each scheme that drafts, what its drafts were worth, by position too."""
        found = {
            decoder.scheme: self._totals[k].figures()
            for k, decoder in enumerate(self._decoders)
            if decoder.scheme != "naive" and self._totals[k].drafts
        }
        if self._expected[1] > 0:
            # of all schemes this one has a training figure
            found["block_drafter"]["expected_accepted_length"] = float(self._expected[0] / self._expected[1])
        return {"drafts": found} if found else {}

    # -- files --------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["texts"] = self._pool.state_dict()
        if self.drafter.proposed is not None:
            checkpoint["proposed"] = self.drafter.proposed.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._pool.load_state_dict(checkpoint.get("texts", {}))
        if "proposed" in checkpoint:
            self.drafter.propose_only(checkpoint["proposed"])
            self._proposed_known = True

    def export(self, folder: str | Path, tokenizer: Any = None, merged: bool = False) -> Path:
        """Write the drafter (drafter.json, drafter.safetensors); the models it drafts for are not copied."""
        return save_drafter(self.drafter, self.verifiers, folder)


def _length(survival: Survival, drafts: int) -> Tensor:
    """Expected accepted tokens of a draft."""
    return survival.accepted.sum() / max(1, drafts)


def _by_position(name: str, survival: Survival) -> dict[str, Tensor]:
    """The share accepted of what is verified, by position from 1."""
    shares = survival.accepted / survival.reached.clamp(min=1e-9)
    return {f"{name}_{k + 1}": share for k, share in enumerate(shares)}
