"""`data=packed_text`: documents of text as one stream of tokens, cut into rows of equal length for pre-training."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from datamodules.batch import pack_prompt_response
from datamodules.corpus import CorpusDataModule
from datamodules.documents import EXTENSIONS, DocumentReader
from datamodules.encoder import Encoder
from datamodules.loader import ResumableLoader, accumulated
from datamodules.packing import EndlessOrder, OnePass, PackedRows, TokenStream
from datamodules.sources import Source, listed, warn_of_known_texts, warn_of_repeats
from datamodules.state import CorpusState, among, still_held_out
from datamodules.token_cache import TokenCache, tokenize_once
from datamodules.tokenizer import build_tokenizer, document_start, fixed_kind
from models.functional.errors import UsageError, require_at_least


class PackedTextDataModule(CorpusDataModule):
    """Options are documented in `conf/data/packed_text.yaml`, batches in `PackedRows`.

    rows: {"train", "val", "test"} -> PackedRows. A row is all response: nothing of it is a prompt.
    """

    length_options = "data.sequence_length"
    packed = True

    def __init__(
        self,
        *,
        name: str,
        train: Source,
        tokenizer: str,
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        eval_batch_size: int,
        cache_dir: str | os.PathLike,
        val: Source | None = None,
        test: Source | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        text_field: str = "text",
        cut: str = "file",
        separator: str = "<|endoftext|>",
        tokenizer_megabytes: float = 100.0,
        shuffle: bool = True,
        document_mask: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            name=name, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, num_workers=num_workers
        )
        self.sources = {"train": train, "val": val, "test": test}
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.reader = DocumentReader(text_field, cut, separator)
        self.tokenizer_kind, self.vocab_size, self.cache_dir = str(tokenizer), vocab_size, os.fspath(cache_dir)
        self.tokenizer_megabytes = tokenizer_megabytes
        self.sequence_length, self.shuffle, self.document_mask = sequence_length, shuffle, document_mask
        self.prompt_length, self.response_length = 0, sequence_length
        self.stream_tokens = sequence_length  # of a row, that come from the stream
        self.longest_prompt = 0  # tokens, of those encoded so far
        self.rows: dict[str, PackedRows] = {}
        require_at_least(1, data__sequence_length=sequence_length)
        for split, fraction in self.fractions.items():
            if self.sources[split] is None and not 0 < fraction < 1:
                raise UsageError(
                    f"data.{split}_fraction={fraction} must lie between 0 and 1; type data.{split}_fraction=0.05"
                )

    def prepare_data(self) -> None:
        """Tokenise before the processes of a run start: those that come later find it done."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenise and split, whatever the stage; a second call does nothing.

        For prompts ("predict") nothing is read where a run's state is known.
        """
        if self.rows:
            return
        if self.sources["train"] is None:
            raise UsageError("data.train is not set; type data.train=FILE.txt")
        prompts_alone = stage == "predict" and self.made_from is not None
        sources = {
            split: listed(source, f"data.{split}", EXTENSIONS)
            for split, source in self.sources.items()
            if source is not None and not prompts_alone
        }
        self.tokenizer = self._train_tokenizer(sources["train"]) if self.made_from is None else self.made_from.tokenizer
        self.bos_id = self._document_start()
        if prompts_alone:
            return
        encoder = Encoder(self.tokenizer)
        if self.made_from is not None and self.made_from.encoding is not None:
            encoder.fingerprint = (
                self.made_from.encoding
            )  # the same tokenizer, whatever its files say since they were copied
        self._encoding = encoder.fingerprint
        caches = {
            split: tokenize_once(
                source, self.reader, encoder, self.bos_id, os.path.join(self.cache_dir, "tokens"), f"data.{split}"
            )
            for split, source in sources.items()
        }
        streams = {split: TokenStream(cache) for split, cache in caches.items()}
        wanted = {split: fraction for split, fraction in self.fractions.items() if split not in caches}
        if wanted:
            parts = self._split(caches["train"].hashes, wanted)
            streams |= {split: TokenStream(caches["train"], chosen) for split, chosen in parts.items()}
            self.held_out_hashes = {split: np.unique(caches["train"].hashes[parts[split]]) for split in wanted}
        for split in ("val", "test"):
            hashes = caches[split].hashes if split in caches else caches["train"].hashes[parts[split]]
            self._digests[split] = hashlib.sha256(hashes.tobytes()).hexdigest()
        for split, stream in streams.items():
            least = self.stream_tokens + 1 if split == "train" else 2
            if len(stream) < least:
                raise UsageError(
                    f"the {split} split has {len(stream)} tokens, fewer than one row; "
                    f"type data.sequence_length={self.longest_row(stream)} or less, or give data.{split} more text"
                )
        warn_of_repeats(sources)
        trained = caches["train"].hashes[parts["train"]] if wanted else caches["train"].hashes
        for split in [split for split in ("val", "test") if split in caches]:
            hashes = caches[split].hashes
            warn_of_known_texts(split, int(among(hashes, trained).sum()), len(hashes), "documents")
        for split, cache in caches.items():
            _warn_of_losses(f"data.{split}", cache, encoder.unknown_id)
        _print_statistics(self.name, streams, self.stream_tokens)
        self.rows = {
            split: PackedRows(stream, self.stream_tokens, document_mask=self.document_mask, endless=split == "train")
            for split, stream in streams.items()
        }

    def _document_start(self) -> int:
        """The token before every document of the stream."""
        return document_start(self.tokenizer, f"data.tokenizer={self.tokenizer_kind}")

    def _train_tokenizer(self, source: Source) -> PreTrainedTokenizerFast:
        folder = os.path.join(self.cache_dir, "tokenizers")
        texts = FirstTexts(self.reader, source, self.tokenizer_megabytes)
        with Console().status(f"{self.name}: tokenizer"):
            return build_tokenizer(self.tokenizer_kind, texts, self.vocab_size, folder, packed=True)

    def _split(self, hashes: np.ndarray, wanted: dict[str, float]) -> dict[str, np.ndarray]:
        """Which documents belong to each split without a source of its own: those of before where a run goes on."""
        kept = {} if self.made_from is None else self.made_from.held_out
        if not still_held_out(kept, hashes, wanted):
            return split_documents(hashes, wanted, self.seed)
        missing = [f"data.{split}=FILE" for split in wanted if split not in kept]
        if missing:
            raise UsageError(
                f"the run in {self.made_from.folder.parent} had files for these splits: type {' '.join(missing)}"
            )
        parts = {split: among(hashes, kept[split]) for split in wanted}
        # what the run held out is trained on neither where a split has a source of its own today
        return parts | {"train": ~among(hashes, np.concatenate(list(kept.values())))}

    def facts(self) -> dict[str, str | float | None]:
        about = self.rows["train"].stream.cache.about
        return super().facts() | {"bytes_per_token": about["text_bytes"] / max(1, about["tokens"] - about["documents"])}

    def special_ids(self) -> dict[str, int | None]:
        """As for every corpus; a folder may lack a mask token, and one without end-of-text or padding uses `<bos>` for them."""
        ids = super().special_ids()
        end = self.bos_id if ids["eos_token_id"] is None else ids["eos_token_id"]
        pad = end if ids["pad_token_id"] is None else ids["pad_token_id"]
        return ids | {"eos_token_id": end, "pad_token_id": pad}

    def longest_row(self, stream: TokenStream) -> int:
        """The data.sequence_length at which a whole row is left of a stream."""
        return len(stream) - 1 + self.sequence_length - self.stream_tokens

    def fingerprint(self) -> str:
        """sha256 of the training tokens' own hash, of the documents held out and of how rows are laid out."""
        self.setup()
        stream = self.rows["train"].stream
        made_from = (stream.cache.folder.name, self.sequence_length, self.document_mask)
        return hashlib.sha256(repr(made_from).encode() + stream.offsets.tobytes() + stream.starts.tobytes()).hexdigest()

    # -- what a run was made with --------------------------------------------------------------------------------------

    def fixed_options(self) -> dict[str, Any]:
        kind = fixed_kind(self.tokenizer_kind, self.vocab_size)
        return kind | {f"{split}_fraction": f for split, f in self.fractions.items() if self.sources[split] is None}

    def state(self) -> CorpusState:
        return replace(super().state(), encoding=self._encoding)

    def example_prompt(self) -> str | None:
        """How the first test document begins."""
        if not self.rows:
            return super().example_prompt()
        begin = self.tokenizer.decode(self.rows["test"][0]["input_ids"][1:33].tolist(), skip_special_tokens=True)
        words = begin.split()[:-1][:4]  # the last one may be cut
        return " ".join(words) if words and " ".join(words).isprintable() else None

    # -- text in, text out --------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Rows that begin a document with the prompt and leave one row's length to continue it, see `datamodules.batch`."""
        ids = [[self.bos_id, *text] for text in self.encode_texts(prompts)]
        longest, unseen = max(map(len, ids)), self.bos_id
        self.longest_prompt = max(self.longest_prompt, longest)
        return pack_prompt_response(
            ids,
            [[]] * len(ids),
            prompt_length=longest,
            response_length=self.sequence_length,
            pad_id=unseen,
            eos_id=unseen,
        )

    def check_prompts(self, what: str, context: int) -> None:
        """A network reads the prompt and all of the response but its last token."""
        room = context + 1 - self.sequence_length
        if self.longest_prompt > room:
            fewer = context + 1 - self.longest_prompt
            shorter = f"data.sequence_length={fewer} to generate fewer tokens, or " if fewer > 0 else ""
            raise UsageError(
                f"a prompt of {self.longest_prompt} tokens (with <bos>) and the {self.sequence_length} tokens after it do not "
                f"fit the {what}, which has {context} positions; type {shorter}a prompt of at most {max(room, 1)} tokens"
            )

    def end_ids(self) -> tuple[int, ...]:
        """A document ends where the next one begins."""
        return tuple(dict.fromkeys([*super().end_ids(), self.bos_id]))

    # -- loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> ResumableLoader:
        rows = self.rows["train"]
        order = EndlessOrder(
            len(rows.stream),
            self.stream_tokens,
            self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            accumulate=accumulated(self.trainer),
        )
        return ResumableLoader(rows, order=order, num_workers=self.num_workers)

    def val_dataloader(self) -> ResumableLoader:
        return self._one_pass("val")

    def test_dataloader(self) -> ResumableLoader:
        return self._one_pass("test")

    def _one_pass(self, split: str) -> ResumableLoader:
        rows = self.rows[split]
        order = OnePass(len(rows.stream), self.stream_tokens, self.eval_batch_size)
        return ResumableLoader(rows, order=order, num_workers=self.num_workers)


class FirstTexts:
    """The first megabytes of the training documents, held out or not, so that the tokenizer does not depend on the seed."""

    def __init__(self, reader: DocumentReader, source: Source, megabytes: float) -> None:
        self.reader, self.source, self.megabytes = reader, source, megabytes

    def __iter__(self) -> Iterator[str]:
        left = self.megabytes * 1e6
        for passage in self.reader.read(self.source, "data.train"):
            yield passage.text
            left -= len(passage.text)
            if left <= 0:
                return


def split_documents(hashes: np.ndarray, fractions: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Which documents (bool, one each) belong to each split of `fractions`, and to `train`, which gets the rest.

    hashes: of the documents' texts. Documents with the same text go to the same split, so that none holds a text of another.
    Raises UsageError where there are too few different documents.
    """
    different, which = np.unique(hashes, return_inverse=True)
    counts = {split: max(1, round(fraction * len(different))) for split, fraction in fractions.items()}
    if sum(counts.values()) >= len(different):
        options = " and ".join(f"data.{split}=FILE" for split in fractions)
        raise UsageError(
            f"data.train has too few different documents ({len(different)}) to hold {sum(counts.values())} out; "
            f"type {options}, or data.cut=line, blank_line or separator where a text file holds many documents"
        )
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).numpy()
    edges = np.cumsum(list(counts.values()))
    parts = zip([*counts, "train"], np.split(order, edges), strict=True)
    return {split: np.isin(which, part) for split, part in parts}


def _warn_of_losses(option: str, cache: TokenCache, unknown_id: int) -> None:
    about = cache.about
    if about["unusable"]:
        rank_zero_warn(f"{option}: {about['unusable']} unusable lines were skipped:\n{about['first_unusable']}")
    if about["unknown"]:
        rank_zero_warn(
            f"{option}: {about['unknown']:,} of {about['tokens']:,} tokens are unknown to the tokenizer, so bits per byte "
            "do not count what they hide; type data.tokenizer=byte, or data.tokenizer=bpe data.vocab_size=512 or more"
        )


@rank_zero_only
def _print_statistics(name: str, streams: dict[str, TokenStream], length: int) -> None:
    table = Table(title=f"{name}: rows of {length} tokens", box=SIMPLE)
    for column in ("split", "documents", "tokens", "rows"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in ("train", "val", "test"):
        stream = streams[split]
        table.add_row(split, f"{stream.documents:,}", f"{len(stream):,}", f"{(len(stream) - 1) / length:,.1f}")
    Console().print(table)
