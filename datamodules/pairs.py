"""A prompt -> response corpus from the user's own files."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from datamodules.batch import TensorRows
from datamodules.files import Pairs, read_pairs
from datamodules.pairs_score import PairsScorer
from datamodules.prompt_response import PromptResponseDataModule
from datamodules.slot_values import Numbers, slot_numbers, slot_values
from datamodules.sources import Source, listed, warn_of_known_texts, warn_of_repeats
from datamodules.state import CorpusState, among, still_held_out, text_hashes
from datamodules.template import Template, build_template
from datamodules.text_signals import LENGTH, LENGTHS, OPENING, TextSignals
from datamodules.tokenizer import build_tokenizer, fixed_kind
from models.functional.errors import UsageError
from models.functional.next_token import until_end
from models.functional.rows import SignalWords, signal_columns
from models.functional.vocabulary import choose_mask_token

MANY = 0.05  # of a split's rows, whose loss changes what is measured


@dataclass
class EncodedSplit:
    """One split with its token lists; `kept` numbers the rows that are used, `first_id` is the row id of row 0."""

    pairs: Pairs
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    first_id: int
    kept: list[int]
    dropped: int = 0


class PairsDataModule(PromptResponseDataModule):
    """Reads, tokenizes and splits pairs. Options are documented in `conf/data/pairs.yaml`.

    Rows have one column more than `datamodules.batch` describes: `row_index` (N,), unique over all splits, by which the
    scorer finds the references of a row.
    """

    def __init__(
        self,
        *,
        name: str,
        train: Source,
        prompt_field: str,
        response_field: str,
        tokenizer: str,
        vocab_size: int,
        batch_size: int,
        eval_batch_size: int,
        cache_dir: str | os.PathLike,
        val: Source | None = None,
        test: Source | None = None,
        val_fraction: float = 0.05,
        prompt_length: int | None = None,
        response_length: int | None = None,
        mask_token: str | None = None,
        template: str = "plain",
        prompt_suffix: str = "",
        mark_prompt_end: bool = True,
        end_padding: bool = True,
        group_by_length: bool = False,
        too_long: str = "error",
        max_test_rows: int | None = None,
        test_answers: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            name=name, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, num_workers=num_workers
        )
        self.sources = {"train": train, "val": val, "test": test}
        self.prompt_field, self.response_field = prompt_field, response_field
        self.tokenizer_kind, self.vocab_size, self.cache_dir = str(tokenizer), vocab_size, cache_dir
        self.lengths = {"prompt": prompt_length, "response": response_length}
        self.mask_token = mask_token
        self.template_kind, self.prompt_suffix, self.mark_prompt_end = str(template), prompt_suffix, mark_prompt_end
        self.end_padding, self.group_by_length = end_padding, group_by_length
        self.too_long, self.val_fraction, self.max_test_rows = too_long, val_fraction, max_test_rows
        self.test_answers = test_answers
        if too_long not in ("error", "drop"):
            raise UsageError(f"data.too_long={too_long} is unknown; type data.too_long=error or data.too_long=drop")
        if val is None and not 0 < val_fraction < 1:
            raise UsageError(f"data.val_fraction={val_fraction} must lie between 0 and 1; type data.val_fraction=0.05")
        if max_test_rows is not None and max_test_rows < 1:
            raise UsageError(f"data.max_test_rows={max_test_rows} leaves no row; type data.max_test_rows=null for all")
        if test_answers is not None and not 1 <= test_answers <= (max_test_rows or test_answers):
            raise UsageError(
                f"data.test_answers={test_answers} must be at least 1 and at most data.max_test_rows={max_test_rows}; "
                "null keeps the rows of the file"
            )

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenize and lay out all splits, whatever the stage; a second call does nothing.

        For prompts ("predict") nothing is read where a run's state is known.
        """
        if self.rows:
            return
        state = self.made_from
        if state is not None:
            self.tokenizer = state.tokenizer
            self.lengths = {
                "prompt": self.lengths["prompt"] or state.prompt_length,
                "response": self.lengths["response"] or state.response_length,
            }
            _ = self.template  # may choose another end token
            if stage == "predict" and None not in self.lengths.values():
                self.prompt_length, self.response_length = self.lengths["prompt"], self.lengths["response"]
                return
        console = Console()
        with console.status(f"{self.name}: reading the files"):
            pairs = self._read_splits()
        with console.status(f"{self.name}: tokenizer and tokens of {len(pairs['train'])} training rows"):
            if state is None:
                texts = pairs["train"].prompts + pairs["train"].responses
                self.tokenizer = build_tokenizer(self.tokenizer_kind, texts, self.vocab_size, self.cache_dir)
                if self.mask_token is not None:
                    self.tokenizer.mask_token = choose_mask_token(self.tokenizer, self.mask_token)
                _ = self.template
            splits, next_id = {}, 0
            for split, read in pairs.items():
                splits[split] = self._encode(read, next_id)
                next_id += len(read)
        self.prompt_length = self.lengths["prompt"] or _round_up(splits["train"].prompt_ids)
        self.response_length = self.lengths["response"] or _round_up(splits["train"].response_ids)
        for name, split in splits.items():
            unread = stage == "test" and name == "train" and state is not None  # rows that a run's file got later
            self._leave_out_too_long(name, split, error=self.too_long == "error" and not unread)
        if "test" not in splits:
            rank_zero_warn("data.test is not set, so the test figures are those of the val split")
            splits["test"] = EncodedSplit(**vars(splits["val"]))
        self._digests = {split: _digest(splits[split].pairs) for split in ("val", "test")}
        if self.sources["val"] is None:
            self.held_out_hashes = {"val": text_hashes(dict.fromkeys(pairs["val"].prompts))}
        self._choose_test_rows(splits["test"])

        self.scorer = self._scorer(pairs)
        _print_statistics(self.name, splits, self.tokenizer.unk_token_id)
        self.rows = {name: self._rows(split) for name, split in splits.items()}
        for rows in self.rows.values():
            rows.columns |= signal_columns(self.signals(rows.columns))

    def facts(self) -> dict[str, str | float | None]:
        ids = self.rows["test"].columns["row_index"].tolist()
        return super().facts() | {"reference_slot_accuracy": self.scorer.reference_slot_accuracy(ids)}

    def fingerprint(self) -> str:
        """sha256 of the training rows as encoded, of the vocabulary and of the special tokens."""
        self.setup()
        tokenizer, columns = self.tokenizer, self.rows["train"].columns
        special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)
        digest = hashlib.sha256(repr((self.prompt_length, self.response_length, special)).encode())
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
        for name in ("input_ids", "attention_mask", "completion_mask"):
            if name in columns:
                digest.update(columns[name].numpy().tobytes())
        return digest.hexdigest()

    # -- what a run was made with --------------------------------------------------------------------------------------

    def fixed_options(self) -> dict[str, Any]:
        kind = fixed_kind(self.tokenizer_kind, self.vocab_size)
        held_out = {"val_fraction": self.val_fraction} if self.sources["val"] is None else {}
        own = {
            "mark_prompt_end": self.mark_prompt_end,
            "template": self.template_kind,
            "prompt_suffix": self.prompt_suffix,
        }
        return kind | held_out | own

    def state(self) -> CorpusState:
        signals = {"slots": self._slot_numbers, "text": self._text_signals.state()}
        return replace(super().state(), signals=signals)

    @staticmethod
    def named_test(sources: dict[str, list[str] | None]) -> list[str] | None:
        return sources["test"] or sources["val"]

    def example_prompt(self) -> str | None:
        if not self.rows:
            return super().example_prompt()
        prompts = [self.scorer.prompts[row] for row in self.rows["test"].columns["row_index"].tolist()]
        return next((prompt for prompt in prompts if prompt.isprintable() and prompt), None)

    # -- splits -------------------------------------------------------------------------------------------------------

    def _read_splits(self) -> dict[str, Pairs]:
        """The train and val splits, and the test split where it has a source of its own."""
        pairs = {}
        sources = {
            split: listed(source, f"data.{split}") for split, source in self.sources.items() if source is not None
        }
        for split, items in sources.items():
            pairs[split] = read_pairs(items, self.prompt_field, self.response_field, option=f"data.{split}")
        if "train" not in pairs:
            raise UsageError("data.train is not set; type data.train=FILE.jsonl")
        if "val" not in pairs:
            pairs["train"], pairs["val"] = self._hold_out(pairs["train"])
        warn_of_repeats(sources)
        for split in ("val", "test"):
            if self.sources[split] is not None:  # else its prompts are set aside from train
                rows = Counter(zip(pairs[split].prompts, pairs[split].responses, strict=True))
                # of train, which may have a hundred times as many rows, no set is made
                trained = {
                    row for row in zip(pairs["train"].prompts, pairs["train"].responses, strict=True) if row in rows
                }
                warn_of_known_texts(split, sum(rows[row] for row in trained), rows.total(), "rows")
        return pairs

    def _hold_out(self, pairs: Pairs) -> tuple[Pairs, Pairs]:
        """Set val_fraction of the prompts aside, with all their rows, so that none lies in both parts."""
        prompts = list(dict.fromkeys(pairs.prompts))
        if len(prompts) < 2:
            raise UsageError("all rows of data.train have the same prompt, so none can be held out; type data.val=FILE")
        count = min(max(1, round(self.val_fraction * len(prompts))), len(prompts) - 1)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(self.seed))
        held = {prompts[i] for i in order[:count].tolist()}
        kept = {} if self.made_from is None else self.made_from.held_out
        hashes = text_hashes(prompts)
        if still_held_out(kept, hashes, ["val"]):
            again = among(hashes, kept["val"])
            held = {prompt for prompt, chosen in zip(prompts, again.tolist(), strict=True) if chosen}
        train = pairs.take(i for i, prompt in enumerate(pairs.prompts) if prompt not in held)
        train.problems = pairs.problems
        return train, pairs.take(i for i, prompt in enumerate(pairs.prompts) if prompt in held)

    def _choose_test_rows(self, split: EncodedSplit) -> None:
        """At most max_test_rows; with test_answers every prompt occurs that many times among them."""
        answers = self.test_answers or 1
        if self.test_answers is not None:
            first: dict[str, int] = {}
            for row in split.kept:
                first.setdefault(split.pairs.prompts[row], row)
            split.kept = list(first.values())
        if self.max_test_rows is not None:
            order = torch.randperm(len(split.kept), generator=torch.Generator().manual_seed(self.seed))
            split.kept = [split.kept[i] for i in sorted(order[: self.max_test_rows // answers].tolist())]
        split.kept = [row for row in split.kept for _ in range(answers)]

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _encode(self, pairs: Pairs, first_id: int) -> EncodedSplit:
        prompt_ids = _encode_each_once(pairs.prompts, self.template.encode_prompts)
        response_ids = _encode_each_once(pairs.responses, self.template.encode_responses)
        return EncodedSplit(pairs, prompt_ids, response_ids, first_id, kept=list(range(len(pairs))))

    @cached_property
    def template(self) -> Template:
        state = self.made_from
        own = state is None or "template" in state.options  # earlier versions wrote no BOS
        kept = state is not None and own and self.template_kind != "plain"  # a file's text is kept with the tokenizer
        return build_template(
            "chat" if kept else self.template_kind,
            self.tokenizer,
            suffix=self.prompt_suffix,
            mark_end=self.mark_prompt_end,
            begin=own,
        )

    def _leave_out_too_long(self, name: str, split: EncodedSplit, error: bool) -> None:
        limits = {"prompt": self.prompt_length, "response": self.response_length}
        tokens = {"prompt": split.prompt_ids, "response": split.response_ids}
        misfits = {row for what, limit in limits.items() for row, ids in enumerate(tokens[what]) if len(ids) > limit}
        needed = {what: max(map(len, tokens[what]), default=0) for what in limits}
        wider = " ".join(f"data.{what}_length={n}" for what, n in needed.items() if n > limits[what])
        if misfits and error:
            first = min(misfits)
            raise UsageError(
                f"{len(misfits)} rows of the {name} split do not fit data.prompt_length={limits['prompt']} and "
                f"data.response_length={limits['response']}: row {first} has {len(split.prompt_ids[first])} prompt "
                f"tokens and {len(split.response_ids[first])} response tokens "
                f"({split.pairs.prompts[first][:80]!r}); type {wider}, or data.too_long=drop to leave them out"
            )
        split.dropped = len(misfits)
        split.kept = [row for row in split.kept if row not in misfits]
        if not split.kept:
            raise UsageError(
                f"data.too_long=drop leaves no row of the {name} split; type a larger data.prompt_length (now "
                f"{limits['prompt']}) or data.response_length (now {limits['response']})"
            )
        if (share := len(misfits) / len(split.pairs)) > MANY:
            rank_zero_warn(
                f"data.too_long=drop leaves out {share:.0%} of the {name} split, so figures are of short rows alone; "
                f"type {wider} to keep them"
            )

    def _rows(self, split: EncodedSplit) -> TensorRows:
        columns = self._pack(
            [split.prompt_ids[row] for row in split.kept], [split.response_ids[row] for row in split.kept]
        )
        if not self.end_padding:
            response = columns["response_mask"]
            text = until_end(columns["input_ids"].masked_fill(~response, -1), self.tokenizer.eos_token_id)
            columns["completion_mask"] = response & text
        return TensorRows({**columns, "row_index": torch.tensor(split.kept) + split.first_id})

    # -- scoring ------------------------------------------------------------------------------------------------------

    def _scorer(self, pairs: dict[str, Pairs]) -> PairsScorer:
        references, slots = [], []
        for split in pairs.values():
            by_prompt = defaultdict(list)
            for prompt, response in zip(split.prompts, split.responses, strict=True):
                by_prompt[prompt].append(response)
            references += [by_prompt[prompt] for prompt in split.prompts]
            slots += split.slots
        prompts = [prompt for split in pairs.values() for prompt in split.prompts]
        known = {"references": references, "slots": slots, "prompts": prompts}
        return PairsScorer(decode=self.decode_responses, spell=self._spell, **known)

    @property
    def _kept_signals(self) -> dict[str, Any] | None:
        return None if self.made_from is None else self.made_from.signals

    @cached_property
    def _slot_numbers(self) -> Numbers | None:
        kept = self._kept_signals
        return slot_numbers(self.scorer.slots) if kept is None else kept["slots"]

    @cached_property
    def _slot_values(self) -> tuple[list[str], torch.Tensor] | None:
        return None if self._slot_numbers is None else slot_values(self.scorer.slots, self._slot_numbers)

    @property
    def attribute_names(self) -> list[str]:
        """The slots of the prompts, [] where they are no dictionaries."""
        return [] if self._slot_values is None else self._slot_values[0]

    def attributes_of(self, rows: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The number of each row's value of each slot, (N, A), 0 where it has none; None where prompts are no dictionaries."""
        return None if self._slot_values is None else self._slot_values[1][rows["row_index"].cpu()]

    @cached_property
    def _text_signals(self) -> TextSignals:
        if self._kept_signals is not None:
            return TextSignals.of_state(self._kept_signals["text"], self.tokenizer.eos_token_id)
        texts = self.rows["train"].columns["input_ids"][:, -self.response_length :]
        return TextSignals(texts, self.tokenizer.eos_token_id)

    @property
    def signal_sizes(self) -> dict[str, int]:
        """How many values each signal has: slots of dictionary prompts, having none among them, and `TextSignals`."""
        slots = {} if self._slot_values is None else self._slot_numbers
        return {name: 1 + len(values) for name, values in slots.items()} | self._text_signals.sizes

    @property
    def signal_values(self) -> dict[str, list[str]]:
        """{signal: the value behind each number} of slots, `none` for an absent one, and of openings, `other` for rare ones.

        {} where neither rows nor a run's state of them are known.
        """
        if self._kept_signals is None and not self.rows:
            return {}
        openings = self.tokenizer.batch_decode([[token] for token in self._text_signals.openings.tolist()])
        values = {OPENING: ["other", *openings]}
        return values | {name: ["none", *numbers] for name, numbers in (self._slot_numbers or {}).items()}

    def signal_words(self) -> dict[str, SignalWords]:
        """{signal: token ids of its name and values}; none for a rare opening and for lengths."""
        known = self._text_signals
        openings = [[], *([token] for token in known.openings.tolist())]
        values: dict[str, list[list[int]]] = {OPENING: openings, LENGTH: [[]] * LENGTHS}
        for name, numbers in ({} if self._slot_values is None else self._slot_numbers or {}).items():
            values[name] = self.encode_texts([f" {value}" for value in ["none", *numbers]])
        names = self.encode_texts([f" {name}" for name in values])
        return {name: SignalWords(own, values[name]) for name, own in zip(values, names, strict=True)}

    def signals(self, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """{signal: (N,)}: of each slot the number of the row's value, 0 where its prompt has none, and `TextSignals`."""
        ids, values = rows["input_ids"], self.attributes_of(rows)
        slots = () if values is None else values.to(ids.device).unbind(-1)
        return dict(zip(self.attribute_names, slots, strict=True)) | self._text_signals(ids[:, -self.response_length :])

    def _spell(self, text: str) -> str:
        """A text as it comes back from the tokenizer; one with unknown tokens stays as it is, which nothing matches."""
        (ids,) = self.encode_texts([text])
        return text if self.tokenizer.unk_token_id in ids else self.tokenizer.decode(ids)


def _digest(pairs: Pairs) -> str:
    """sha256 of the texts."""
    texts = text_hashes(pairs.prompts).tobytes() + text_hashes(pairs.responses).tobytes()
    return hashlib.sha256(texts).hexdigest()


def _encode_each_once(texts: list[str], encode: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
    # Many rows often share a prompt.
    different = list(dict.fromkeys(texts))
    ids = dict(zip(different, encode(different), strict=True))
    return [ids[text] for text in texts]


def _round_up(token_lists: list[list[int]]) -> int:
    """The longest list, as a multiple of 8."""
    return max(8, -(-max(map(len, token_lists)) // 8) * 8)


@rank_zero_only
def _print_statistics(name: str, splits: dict[str, EncodedSplit], unknown_id: int | None) -> None:
    table = Table(title=f"{name}: rows, and tokens as mean/p95/max before dropping", box=SIMPLE)
    for column in ("split", "rows", "prompt", "response", "unknown", "dropped", "bad lines"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in ("train", "val", "test"):
        encoded = splits[split]
        lists = [*encoded.prompt_ids, *encoded.response_ids]
        unknown = sum(ids.count(unknown_id) for ids in lists) / max(1, sum(map(len, lists)))
        table.add_row(
            split,
            f"{len(encoded.kept)}",
            _lengths(encoded.prompt_ids),
            _lengths(encoded.response_ids),
            f"{unknown:.2%}",
            f"{encoded.dropped}",
            f"{len(encoded.pairs.problems)}",
        )
    Console().print(table)


def _lengths(token_lists: list[list[int]]) -> str:
    counts = torch.tensor([len(ids) for ids in token_lists], dtype=torch.float64)
    p95 = counts.sort().values[max(0, -(-len(counts) * 95 // 100) - 1)]
    return f"{counts.mean():.1f}/{p95:.0f}/{counts.max():.0f}"
