"""The base of every prompt -> response corpus: three splits of rows, their loaders, a tokenizer and a scorer."""

from lightning import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from datamodules.batch import TensorRows, pack_prompt_response
from datamodules.loader import ResumableLoader
from datamodules.score import Scorer
from models.functional.errors import UsageError


class PromptResponseDataModule(LightningDataModule):
    """Subclasses set `tokenizer`, `prompt_length`, `response_length`, `scorer` and `rows` in their `setup`.

    name: the corpus' name in tables and records.
    rows: {"train", "val", "test"} -> TensorRows laid out as `datamodules.batch` describes.
    mark_prompt_end: prompts end in an end-of-text token. Every response place of an all-mask response looks alike but for
        its distance to the text before it, so without a mark a network must first find out where the prompt ends.
    """

    tokenizer: PreTrainedTokenizerFast
    scorer: Scorer
    prompt_length: int
    response_length: int
    mark_prompt_end: bool = False

    def __init__(
        self, *, name: str, batch_size: int, eval_batch_size: int, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.name, self.batch_size, self.eval_batch_size = name, batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self.rows: dict[str, TensorRows] = {}

    # -- what a corpus tells about itself ------------------------------------------------------------------------

    def facts(self) -> dict[str, str | float | None]:
        """Truths for the record: entropy in nats per response token, total correlation given the prompt in nats."""
        return {"name": self.name, "entropy_nats_per_token": None, "conditional_total_correlation": None}

    def fingerprint(self) -> str:
        """A string that changes whenever the training rows or the vocabulary change (part of a teacher's cache key)."""
        raise NotImplementedError

    def controls(self) -> list:
        """Decoders that need no model, such as the product of marginals; empty where the truth is not known."""
        return []

    def special_ids(self) -> dict[str, int]:
        """What a network with fresh weights needs to know of the vocabulary."""
        ids = self.tokenizer
        names = ("mask_token_id", "eos_token_id", "pad_token_id")
        return {"vocab_size": len(ids), **{name: getattr(ids, name) for name in names}}

    def check_network(self, what: str, vocab_size: int, mask_token_id: int | None, context: int) -> None:
        """Raise UsageError unless a network of this vocabulary and context length can read the corpus.

        mask_token_id: None for a network that knows no mask.
        """
        columns = self.prompt_length + self.response_length
        if columns > context:
            raise UsageError(
                f"prompt ({self.prompt_length}) and response ({self.response_length}) need {columns} positions, the {what} "
                f"has {context}; shorten data.prompt_length or data.response_length"
            )
        if len(self.tokenizer) > vocab_size or mask_token_id not in (None, self.tokenizer.mask_token_id):
            raise UsageError(
                f"the {what} has {vocab_size} token ids with mask {mask_token_id}, the corpus' tokenizer "
                f"{len(self.tokenizer)} with mask {self.tokenizer.mask_token_id}; they belong to different vocabularies "
                f"(type data.tokenizer=<the folder of the {what}> or another {what})"
            )

    # -- text in, text out ----------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Rows whose response columns are all masked, ready for a decoder. Raises UsageError on a too long prompt."""
        end = [self.tokenizer.eos_token_id] if self.mark_prompt_end else []
        ids = [self.tokenizer.encode(prompt, add_special_tokens=False) + end for prompt in prompts]
        rows = pack_prompt_response(
            ids,
            [[] for _ in ids],
            prompt_length=self.prompt_length,
            response_length=self.response_length,
            pad_id=self.tokenizer.pad_token_id,
            eos_id=self.tokenizer.eos_token_id,
        )
        rows["input_ids"][rows["response_mask"]] = self.tokenizer.mask_token_id
        return rows

    def decode_responses(self, responses: Tensor) -> list[str]:
        """Responses (N, R) as text, cut at the first end-of-text token."""
        texts = []
        for ids in responses.tolist():
            if self.tokenizer.eos_token_id in ids:
                ids = ids[: ids.index(self.tokenizer.eos_token_id)]
            texts.append(self.tokenizer.decode(ids))
        return texts

    def decode_prompts(self, rows: dict[str, Tensor]) -> list[str]:
        """The prompts of a batch as text, without padding and end mark."""
        prompt = rows["attention_mask"] & ~rows["response_mask"] & (rows["input_ids"] != self.tokenizer.eos_token_id)
        return [self.tokenizer.decode(ids[keep].tolist()) for ids, keep in zip(rows["input_ids"], prompt, strict=True)]

    # -- loaders --------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> ResumableLoader:
        return self._loader("train", self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> ResumableLoader:
        return self.test_dataloader()

    def _loader(self, split: str, batch_size: int, *, shuffle: bool = False, drop_last: bool = False):
        rows = self.rows[split]
        if drop_last and len(rows) < batch_size:
            raise UsageError(
                f"the {split} split has {len(rows)} rows, fewer than one batch; type data.batch_size={len(rows)} or less"
            )
        return ResumableLoader(
            rows, batch_size, shuffle=shuffle, drop_last=drop_last, seed=self.seed, num_workers=self.num_workers
        )


def check_special_tokens(tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    """Raise UsageError when a tokenizer lacks the mask, end-of-text or padding token that the methods here need."""
    for name in ("mask_token", "eos_token", "pad_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise UsageError(
                f"the tokenizer in {where} has no {name}; add one to it "
                f"(tokenizer.add_special_tokens({{'{name}': '<{name.removesuffix('_token')}>'}}), then save_pretrained) "
                f"or type data.tokenizer=bpe"
            )
