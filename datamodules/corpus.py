"""What every corpus can be asked for, whatever its rows look like."""

from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningDataModule
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from datamodules.plain_text import plain_backend
from datamodules.state import CorpusState, absolute_source
from datamodules.tokenizer import end_ids
from models.functional.errors import UsageError, require_at_least
from models.functional.vocabulary import vocabulary_size


class CorpusDataModule(LightningDataModule):
    """Subclasses set `tokenizer`, `prompt_length` and `response_length` in their `setup`.

    name: the corpus' name in tables and records. batch_size, eval_batch_size: rows per step and device.
    made_from: the corpus of the run that this one goes on from (`take`); None for a run that begins.
    """

    made_from: CorpusState | None = None
    sources: dict[str, Any]  # {split: where it is read from}; empty for a corpus that is not read
    held_out_hashes: dict[str, np.ndarray]  # {split: of what was held out of the training rows}
    packed = False  # whether it is a stream of documents
    end_padding = True  # whether causal models are scored on, and generate, the end tokens that fill a response

    tokenizer: PreTrainedTokenizerFast
    prompt_length: int
    response_length: int
    length_options = "data.prompt_length or data.response_length"  # what makes rows shorter

    def __init__(
        self, *, name: str, batch_size: int, eval_batch_size: int, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.sources, self.held_out_hashes = {}, {}
        self._digests: dict[str, str] = {}  # of the val and test splits that are read
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

    # -- what a run was made with --------------------------------------------------------------------------------------

    def take(self, state: CorpusState) -> None:
        """Use a run's corpus state, its seed and tokenizer among it, instead of making them again. Call it before `setup`.

        `setup("predict")` then reads no rows, where the state has all that prompts need.
        Errors: UsageError where an option would change what ids mean.
        """
        if state.kind not in (None, type(self).__name__):  # another kind of rows: the vocabulary is all they share
            state = CorpusState(folder=state.folder, tokenizer=state.tokenizer, encoding=state.encoding)
        own = self.fixed_options()
        for name, then in state.options.items():
            if name in own and own[name] != then:
                raise UsageError(
                    f"data.{name}={own[name]}: the run in {state.folder.parent} was made with data.{name}={then}, which "
                    "decides what its token ids and rows mean; leave it at that, or train again"
                )
        self.made_from = state
        if state.seed is not None:
            self.seed = state.seed

    def fixed_options(self) -> dict[str, Any]:
        """The options that decide what ids and rows mean."""
        return {}

    def state(self) -> CorpusState:
        """What a run has to keep of the corpus, after `setup`. Subclasses add what they know."""
        return CorpusState(
            folder=Path(),
            tokenizer=self.tokenizer,
            kind=type(self).__name__,
            options=self.fixed_options(),
            seed=self.seed,
            prompt_length=self.prompt_length,
            response_length=self.response_length,
            fingerprint=self.fingerprint(),
            sources={split: absolute_source(source) for split, source in self.sources.items()},
            val=self.digest("val"),
            test=self.digest("test"),
            held_out=self.held_out_hashes,
            example_prompt=self.example_prompt(),
        )

    def require_same_training(self) -> None:
        """Raise UsageError unless the rows to train on and to validate on are those of the run that is gone on with.

        Validation rows that are read from another path may be others.
        """
        state = self.made_from
        if state is not None and state.fingerprint not in (None, self.fingerprint()):
            raise UsageError(
                f"the training rows are not those of the run in {state.folder.parent}: data.train, or an option of its rows, "
                "has changed since; restore it to go on with ckpt_path, or leave ckpt_path out and start a new run"
            )
        if state is None or state.val in (None, self.digest("val")):
            return
        if absolute_source(self.sources["val"]) == state.sources["val"]:
            raise UsageError(
                f"the validation rows are not those of the run in {state.folder.parent}, whose losses could not be compared; "
                "restore its data.val, or name other data by another path (data.val=FILE)"
            )

    def require_same_test(self) -> None:
        """Raise UsageError where the test rows have changed since the run, though no other source is named for them."""
        state = self.made_from
        if state is None or state.test is None or state.test == self.digest("test"):
            return
        now = {split: absolute_source(source) for split, source in self.sources.items()}
        named, train = self.named_test(now), now["train"]
        other = train != state.sources["train"] if named is None else named != self.named_test(state.sources)
        if not other:
            raise UsageError(
                f"the test rows are not those of the run in {state.folder.parent}, whose figures could not be compared; "
                "restore its data.train, data.val and data.test, or name other data by another path (data.test=FILE)"
            )

    def digest(self, split: str) -> str | None:
        """sha256 of the texts of the val or test split; None for a corpus that is not read."""
        return self._digests.get(split)

    @staticmethod
    def named_test(sources: dict[str, list[str] | None]) -> list[str] | None:
        """Where the test rows are read from, of {split: source}; None where they are held out of the training rows."""
        return sources["test"]

    def example_prompt(self) -> str | None:
        """A prompt of the test split to show; None where there is none of one line."""
        return None if self.made_from is None else self.made_from.example_prompt

    # -- what others ask ----------------------------------------------------------------------------------------------

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
                f"(type data.tokenizer=<the folder of the {what}> or another {what}; for tokens added to its tokenizer, "
                "model.resize_token_embeddings(len(tokenizer)) and save_pretrained first)"
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

    def end_ids(self) -> tuple[int, ...]:
        """The tokens at which a text ends: the tokenizer's own, which fills what is beyond, then those of its model.

        Whatever generates, counts or decodes texts asks here.
        """
        return self._end_ids

    @cached_property
    def _end_ids(self) -> tuple[int, ...]:
        return end_ids(self.tokenizer)

    def decode_responses(self, responses: Tensor) -> list[str]:
        """Responses (N, R) as text, cut at the first token that ends one."""
        ends = self.end_ids()
        texts = [list(takewhile(lambda token: token not in ends, ids)) for ids in responses.tolist()]
        return [self.tokenizer.decode(ids) for ids in texts]
