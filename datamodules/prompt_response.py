"""The base of every prompt -> response corpus: three splits of rows, their loaders, a tokenizer and a scorer."""

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batch import TensorRows, pack_prompt_response
from datamodules.corpus import CorpusDataModule
from datamodules.loader import ResumableLoader, accumulated
from datamodules.score import Scorer
from models.functional.errors import UsageError


class PromptResponseDataModule(CorpusDataModule):
    """Subclasses set `tokenizer`, `prompt_length`, `response_length`, `scorer` and `rows` in their `setup`.

    common: the options of every corpus. rows: {"train", "val", "test"} -> TensorRows laid out as `datamodules.batch` describes.
    mark_prompt_end: prompts end in an end-of-text token. Every position of an all-mask response looks alike but for
        its distance to the text before it, so without a mark a network must first find out where the prompt ends.
    """

    scorer: Scorer
    mark_prompt_end: bool = False

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.rows: dict[str, TensorRows] = {}

    # -- text in, text out ----------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Rows whose response columns are all masked, ready for a decoder. Raises UsageError on a too long prompt."""
        end = [self.tokenizer.eos_token_id] if self.mark_prompt_end else []
        ids = [text + end for text in self.encode_texts(prompts)]
        rows = pack_prompt_response(
            ids,
            [[] for _ in ids],
            prompt_length=self.prompt_length,
            response_length=self.response_length,
            pad_id=self.tokenizer.pad_token_id,
            eos_id=self.tokenizer.eos_token_id,
        )
        hidden = self.tokenizer.mask_token_id
        rows["input_ids"][rows["response_mask"]] = self.tokenizer.eos_token_id if hidden is None else hidden
        return rows

    def decode_prompts(self, rows: dict[str, Tensor]) -> list[str]:
        """The prompts of a batch as text, without padding and end mark."""
        prompt = rows["attention_mask"] & ~rows["response_mask"] & (rows["input_ids"] != self.tokenizer.eos_token_id)
        return [self.tokenizer.decode(ids[keep].tolist()) for ids, keep in zip(rows["input_ids"], prompt, strict=True)]

    # -- loaders --------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> ResumableLoader:
        accumulate = accumulated(self.trainer)
        return self._loader("train", self.batch_size, shuffle=True, drop_last=True, accumulate=accumulate)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """The test split's batches, laid out beforehand: a trainer that predicts rebuilds loaders, and cannot rebuild ours."""
        return DataLoader(list(self.test_dataloader()), batch_size=None)

    def _loader(
        self, split: str, batch_size: int, *, shuffle: bool = False, drop_last: bool = False, accumulate: int = 1
    ):
        rows = self.rows[split]
        if drop_last and len(rows) < batch_size:
            raise UsageError(
                f"the {split} split has {len(rows)} rows, fewer than one batch; type data.batch_size={len(rows)} or less"
            )
        return ResumableLoader(
            rows,
            batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self.seed,
            accumulate=accumulate,
            num_workers=self.num_workers,
        )
