"""What every corpus can be asked for, whatever its rows look like."""

from functools import cached_property
from itertools import takewhile

from lightning import LightningDataModule
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from datamodules.plain_text import plain_backend
from datamodules.tokenizer import further_ends
from models.functional.errors import UsageError, require_at_least
from models.functional.vocabulary import vocabulary_size


class CorpusDataModule(LightningDataModule):
    """Subclasses set `tokenizer`, `prompt_length` and `response_length` in their `setup`.

    name: the corpus' name in tables and records. batch_size, eval_batch_size: rows per step and device.
    """

    tokenizer: PreTrainedTokenizerFast
    prompt_length: int
    response_length: int
    length_options = "data.prompt_length or data.response_length"  # what makes rows shorter

    def __init__(
        self, *, name: str, batch_size: int, eval_batch_size: int, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        require_at_least(1, data__batch_size=batch_size, data__eval_batch_size=eval_batch_size)
        require_at_least(0, data__seed=seed, data__num_workers=num_workers)
        self.name, self.batch_size, self.eval_batch_size = name, batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers

    def facts(self) -> dict[str, str | float | None]:
        """Known values for the record: entropy in nats per response token, total correlation given the prompt in nats."""
        return {"name": self.name, "entropy_nats_per_token": None, "conditional_total_correlation": None}

    def fingerprint(self) -> str:
        """A string that changes whenever the training rows or the vocabulary change (part of a teacher's cache key)."""
        raise NotImplementedError

    def controls(self) -> list:
        """Decoders that need no model, such as the product of marginals; empty where none are known."""
        return []

    def special_ids(self) -> dict[str, int]:
        """Size of the vocabulary and the special ids, as a network with fresh weights takes them."""
        ids = self.tokenizer
        names = ("mask_token_id", "eos_token_id", "pad_token_id")
        return {"vocab_size": vocabulary_size(ids), **{name: getattr(ids, name) for name in names}}

    def check_network(self, what: str, vocab_size: int, mask_token_id: int | None, context: int) -> None:
        """Raise UsageError unless a network of this vocabulary and context length can read the corpus and its prompts.

        mask_token_id: None for a network that has no use for a mask.
        """
        columns = self.prompt_length + self.response_length
        if columns > context:
            raise UsageError(
                f"rows of the corpus need {columns} positions, the {what} has {context}; shorten {self.length_options}"
            )
        self.check_prompts(what, context)
        mask = self.tokenizer.mask_token_id
        if vocabulary_size(self.tokenizer) > vocab_size or mask_token_id not in (None, mask):
            raise UsageError(
                f"the {what} has {vocab_size} token ids with mask {mask_token_id}, the corpus' tokenizer "
                f"{vocabulary_size(self.tokenizer)} with mask {mask}; they belong to different vocabularies "
                f"(type data.tokenizer=<the folder of the {what}> or another {what})"
            )

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        return plain_backend(self.tokenizer)

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text alone. A special token that a text spells is encoded as the characters it is written with."""
        return [found.ids for found in self._plain_backend.encode_batch_fast(texts, add_special_tokens=False)]

    def check_prompts(self, what: str, context: int) -> None:
        """Raise UsageError unless the prompts encoded so far, with their responses, fit a network's context.

        Where every prompt fits `prompt_length` there is nothing to check here.
        """

    def end_ids(self) -> set[int]:
        """The tokens at which a text ends."""
        return {self.tokenizer.eos_token_id} | self._further_ends

    @cached_property
    def _further_ends(self) -> set[int]:
        return further_ends(self.tokenizer)

    def decode_responses(self, responses: Tensor) -> list[str]:
        """Responses (N, R) as text, cut at the first token that ends one."""
        ends = self.end_ids()
        texts = [list(takewhile(lambda token: token not in ends, ids)) for ids in responses.tolist()]
        return [self.tokenizer.decode(ids) for ids in texts]
