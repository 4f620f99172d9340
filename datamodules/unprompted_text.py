"""`data=unprompted_text`: rows of packed text as responses without a prompt, for models that generate whole rows."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.batch import TensorRows, pack_prompt_response
from datamodules.controls import HeldOutText, UnigramText
from datamodules.judged_text import JudgeOf, TextJudge
from datamodules.loader import ResumableLoader
from datamodules.packed_text import PackedTextDataModule
from datamodules.packing import PackedRows, TokenStream
from datamodules.text_score import TextScorer
from datamodules.tokenizer import document_start, require_end_token
from models.functional.errors import UsageError, require_at_least
from models.functional.vocabulary import vocabulary_size


class WholeRows(PackedRows):
    """Row r of a stream as a response without a prompt, laid out as `datamodules.batch` describes, with P = 0.

    The response is the row's labels, so that every token of a pass is in exactly one row, and `target_bytes` belongs to it.
    around: two ids, which are put before and after the labels of every row; they spell no byte.
    """

    def __init__(self, stream: TokenStream, length: int, *, endless: bool, around: tuple[int, int] | None) -> None:
        super().__init__(stream, length, document_mask=False, endless=endless)
        self.around = around

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        packed = super().__getitems__(rows)
        ids, sizes = packed["labels"], packed["target_bytes"]
        if self.around is not None:
            ids, sizes = between(ids, *self.around), between(sizes, 0, 0)
        every = torch.ones_like(ids, dtype=torch.bool)
        return {"input_ids": ids, "attention_mask": every, "response_mask": every.clone(), "target_bytes": sizes}


class UnpromptedTextDataModule(PackedTextDataModule):
    """The options of `PackedTextDataModule`, and:

    judge: scores texts in its own tokens, such as `models.backbones.judge.Judge`, or None.
    max_eval_rows: at most this many rows of val and of test, evenly spread. Every decoder generates as many texts as there
        are test rows.
    wrapped: each row is `<bos>`, sequence_length - 2 tokens of the stream and end-of-text, and documents of the stream are
        divided by end-of-text, as in the data of MDLM (2406.07524).
    """

    rows: dict[str, Any]  # train: WholeRows of an endless stream; val and test: TensorRows

    def __init__(
        self,
        *,
        judge: TextJudge | None = None,
        max_eval_rows: int | None = None,
        wrapped: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.judge, self.max_eval_rows, self.wrapped = judge, max_eval_rows, wrapped
        if wrapped:
            require_at_least(3, data__sequence_length=self.sequence_length)
            self.stream_tokens -= 2
        if self.document_mask:
            raise UsageError(
                "data.document_mask=true has no use here: a row is generated as one text; type data.document_mask=false"
            )
        if max_eval_rows is not None and max_eval_rows < 1:
            raise UsageError(f"data.max_eval_rows={max_eval_rows} leaves no row; type data.max_eval_rows=null for all")

    def setup(self, stage: str | None = None) -> None:
        if self.rows:
            return
        super().setup(stage)
        if not self.rows:  # prompts alone
            return
        ends = (*super().end_ids(), *(self._around() or ()))
        self.scorer = TextScorer(None if self.judge is None else JudgeOf(self.judge, self.tokenizer, ends))
        train = WholeRows(self.rows["train"].stream, self.stream_tokens, endless=True, around=self._around())
        self.rows = {"train": train, "val": self._held_out("val"), "test": self._held_out("test")}

    def _document_start(self) -> int:
        if not self.wrapped:
            return super()._document_start()
        require_end_token(self.tokenizer, f"data.tokenizer={self.tokenizer_kind}")
        return self.tokenizer.eos_token_id

    def _around(self) -> tuple[int, int] | None:
        """The ids before and after the tokens of a row, where there are any."""
        return (document_start(self.tokenizer), self.tokenizer.eos_token_id) if self.wrapped else None

    def fingerprint(self) -> str:
        found = super().fingerprint()
        return hashlib.sha256(f"{found} {self._around()}".encode()).hexdigest() if self.wrapped else found

    def _held_out(self, split: str) -> TensorRows:
        """The whole rows of a split; what is left after the last one is left out."""
        stream = self.rows[split].stream
        rows = (len(stream) - 1) // self.stream_tokens
        if rows == 0:
            raise UsageError(
                f"the {split} split has {len(stream)} tokens, fewer than one row; "
                f"type data.sequence_length={self.longest_row(stream)} or less"
            )
        chosen = np.linspace(0, rows - 1, min(rows, self.max_eval_rows or rows)).round().astype(int)
        whole = WholeRows(stream, self.stream_tokens, endless=False, around=self._around())
        return TensorRows(whole.__getitems__(chosen.tolist()))

    def _one_pass(self, split: str) -> ResumableLoader:
        return ResumableLoader(self.rows[split], self.eval_batch_size, num_workers=self.num_workers)

    def controls(self) -> list:
        counts = token_counts(self.rows["train"].stream, vocabulary_size(self.tokenizer))
        return [UnigramText(counts, self._around()), HeldOutText()]

    def example_prompt(self) -> None:
        """None: texts have no prompt."""

    # -- text in, text out --------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """A row without a prompt for each of the prompts, which must be empty."""
        for prompt in prompts:
            if prompt:
                raise UsageError(f"prompt={prompt!r}: texts of this corpus have none; leave prompt= out")
        mask = self.tokenizer.mask_token_id
        none: list[list[int]] = [[]] * len(prompts)
        return pack_prompt_response(
            none, none, prompt_length=0, response_length=self.sequence_length, pad_id=mask, eos_id=mask
        )

    def decode_prompts(self, rows: dict[str, Tensor]) -> list[str]:
        return [""] * len(rows["input_ids"])

    def end_ids(self) -> tuple[int, ...]:
        """A row is shown whole: documents may begin inside of it."""
        return ()


def between(columns: Tensor, first: int, last: int) -> Tensor:
    """(B, T) -> (B, T + 2) with the same two numbers at the ends of every row."""
    rows = len(columns)
    return torch.cat([columns.new_full((rows, 1), first), columns, columns.new_full((rows, 1), last)], 1)


def token_counts(stream: TokenStream, vocab_size: int) -> Tensor:
    """How often each token occurs in one pass over the stream, (V,)."""
    pieces = (stream.cache.tokens[at : at + count] for _, at, count in stream.spans(0, len(stream)))
    return torch.from_numpy(sum(np.bincount(piece, minlength=vocab_size) for piece in pieces))
