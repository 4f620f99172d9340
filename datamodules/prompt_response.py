"""The base of every prompt -> response corpus: three splits of rows, their loaders, a tokenizer and a scorer."""

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batch import TensorRows, pack_prompt_response, trim_columns
from datamodules.corpus import CorpusDataModule
from datamodules.loader import ResumableLoader, accumulated
from datamodules.score import Scorer
from datamodules.template import PlainTemplate, Template
from models.functional.errors import UsageError
from models.functional.next_token import completion_mask


class PromptResponseDataModule(CorpusDataModule):
    """Subclasses set `tokenizer`, `prompt_length`, `response_length`, `scorer` and `rows` in their `setup`.

    common: the options of every corpus. rows: {"train", "val", "test"} -> TensorRows laid out as `datamodules.batch` describes.
    group_by_length: training rows of like length share a batch, and columns that are padding in all of its rows are cut off.
    """

    scorer: Scorer
    group_by_length: bool = False

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.rows: dict[str, TensorRows] = {}

    # -- text in, text out ----------------------------------------------------------------------------------------

    @property
    def template(self) -> Template:
        """What surrounds a prompt and precedes its response."""
        return PlainTemplate(self.tokenizer, begin=False)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Rows whose response columns are all masked, ready for a decoder. Raises UsageError on a too long prompt."""
        rows = self._pack(self.template.encode_prompts(prompts), [[] for _ in prompts])
        hidden = self.tokenizer.mask_token_id
        rows["input_ids"][rows["response_mask"]] = self.tokenizer.eos_token_id if hidden is None else hidden
        return rows

    def _pack(self, prompt_ids: list[list[int]], response_ids: list[list[int]]) -> dict[str, Tensor]:
        return pack_prompt_response(
            prompt_ids,
            response_ids,
            prompt_length=self.prompt_length,
            response_length=self.response_length,
            pad_id=self.tokenizer.pad_token_id,
            eos_id=self.tokenizer.eos_token_id,
        )

    def decode_prompts(self, rows: dict[str, Tensor]) -> list[str]:
        """The prompts of a batch as text, without padding and what the template adds."""
        prompt = rows["attention_mask"] & ~rows["response_mask"]
        template = self.template
        return [template.decode_prompt(ids[own].tolist()) for ids, own in zip(rows["input_ids"], prompt, strict=True)]

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
            lengths=self._lengths(rows) if self.group_by_length else None,
            collate=trim_columns if self.group_by_length and shuffle else None,
            num_workers=self.num_workers,
        )

    @staticmethod
    def _lengths(rows: TensorRows) -> Tensor:
        """Columns (N,) that a row needs."""
        mask = rows.columns["attention_mask"] & ~rows.columns["response_mask"]
        return (mask | completion_mask(rows.columns)).sum(-1)
