"""`data=oracle`: an embedded corpus whose true distribution is known, with prompts that reveal all, part or none of the plan.

A prompt has one token for each attribute, "who=anna where=? what=lamps mood=?"; the response is the text.
"""

import hashlib

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerFast

from datamodules.batch import TensorRows
from datamodules.oracle.controls import ProductOfMarginals, ResamplingFloor
from datamodules.oracle.distribution import OracleDistribution
from datamodules.oracle.explain import explain
from datamodules.oracle.grammar import SIZES, Grammar, choices, with_style
from datamodules.oracle.score import OracleScorer
from datamodules.prompt_response import PromptResponseDataModule
from datamodules.state import CorpusState
from models.functional.errors import UsageError, require_at_least
from models.functional.rows import signal_columns

SPECIAL = ("<pad>", "<eos>", "<mask>", "<unk>")


class OracleDataModule(PromptResponseDataModule):
    """Synthetic texts with exact likelihoods.

    size: tiny | small | large (see `grammar`). train_rows, val_rows, test_rows: texts drawn for each split with seeds of
    their own. reveal_all, reveal_part: shares of rows whose prompt shows the whole plan or some attributes; the rest show
    nothing. style: probability of the first of several words, wherever there is a choice; None keeps the corpus' own.
    """

    def __init__(
        self,
        *,
        size: str = "small",
        style: float | None = None,
        train_rows: int = 50_000,
        val_rows: int = 512,
        test_rows: int = 2048,
        reveal_all: float = 0.25,
        reveal_part: float = 0.25,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        if size not in SIZES:
            raise UsageError(f"data.size={size} is not known; type data.size=tiny, small or large")
        require_at_least(1, data__train_rows=train_rows, data__val_rows=val_rows, data__test_rows=test_rows)
        if min(reveal_all, reveal_part) < 0 or reveal_all + reveal_part > 1:
            raise UsageError(
                f"data.reveal_all={reveal_all} and data.reveal_part={reveal_part} are shares of the rows: "
                "each at least 0, together at most 1"
            )
        if style is not None and not 0 < style < 1:
            raise UsageError(f"data.style={style} must lie between 0 and 1, or be null for the corpus' own words")
        super().__init__(
            name=f"oracle-{size}" if style is None else f"oracle-{size}-{style:g}",
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.size, self.reveal_all, self.reveal_part = size, reveal_all, reveal_part
        self.sizes = {"train": train_rows, "val": val_rows, "test": test_rows}
        self.grammar = SIZES[size]() if style is None else with_style(SIZES[size](), style)
        self.tokenizer = word_tokenizer(self.grammar)
        self.prompt_length = len(self.grammar.attributes)
        self.response_length = max(len(t.slots) for t in self.grammar.templates)
        self.distribution = OracleDistribution(
            self.grammar,
            self.tokenizer.get_vocab(),
            len(self.tokenizer),
            self.response_length,
            self.tokenizer.eos_token_id,
        )
        self.scorer = OracleScorer(self.distribution, None if style is None else self._style_words())

    def setup(self, stage: str | None = None) -> None:
        for k, (split, rows) in enumerate(self.sizes.items()):
            if split not in self.rows:
                self.rows[split] = self._draw(rows, Generator().manual_seed(self.seed * 1000 + k))

    def fixed_options(self) -> dict[str, str]:
        return {"size": self.size}

    def take(self, state: CorpusState) -> None:
        super().take(state)
        if state.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise UsageError(
                f"the run in {state.folder.parent} has another vocabulary than data=oracle data.size={self.size}; "
                "type the data options that it was trained with"
            )

    def facts(self) -> dict[str, str | float | None]:
        reveal = self.rows["test"].columns["reveal"]
        nothing = torch.full((1, reveal.shape[-1]), -1)
        return {
            "name": self.name,
            "entropy_nats_per_token": self.distribution.entropy(nothing).item() / self.response_length,
            "conditional_total_correlation": self.distribution.total_correlation(reveal[:1024]).mean().item(),
        }

    def fingerprint(self) -> str:
        text = f"{self.grammar}{self.seed}{self.sizes['train']}{self.reveal_all}{self.reveal_part}"
        return hashlib.sha256(text.encode()).hexdigest()

    def controls(self) -> list:
        return [ProductOfMarginals(self.distribution), ResamplingFloor(self.distribution)]

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts such as "who=anna what=lamps": attributes in any order, those left out stay hidden."""
        reveal = torch.stack([self._parse_prompt(prompt) for prompt in prompts])
        rows = self._rows(reveal, torch.full((len(prompts), self.response_length), self.tokenizer.mask_token_id))
        return rows.columns

    def sample_truth(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        """Responses (N, R) drawn from the true p(text | prompt) of each row."""
        return ResamplingFloor(self.distribution)(rows, generator)

    def seen_marginals(self, rows: dict[str, Tensor], evidence: Tensor) -> Tensor:
        """p(word | prompt, what was seen of all words) of every position, (N, R, V) float64; evidence (N, R, V): see there."""
        return self.distribution.seen_marginals(evidence.cpu(), rows["reveal"].cpu())

    def true_nll(self, rows: dict[str, Tensor]) -> Tensor:
        """-log p(text | prompt) of each row's own text in nats, (N,) float64."""
        texts = rows["input_ids"][:, self.prompt_length :]
        return -self.distribution.log_prob(texts.cpu(), rows["reveal"].cpu())

    def list_texts(self, most: int = 5000) -> tuple[Tensor, Tensor] | None:
        """The prompt that reveals nothing (P,) and every text that can follow it (T, R); None where there are too many."""
        try:
            texts = self.distribution.all_texts(most)
        except ValueError:
            return None
        return self.encode_prompts([""])["input_ids"][0, : self.prompt_length], texts

    @property
    def attribute_names(self) -> list[str]:
        return [attribute.name for attribute in self.grammar.attributes]

    def attributes_of(self, rows: dict[str, Tensor]) -> Tensor:
        """What is known of each row's text, (N, A)."""
        return self.hidden_plans(rows)

    def hidden_plans(self, rows: dict[str, Tensor]) -> Tensor:
        """The plan that each row's text tells, one value for each attribute: (N, A)."""
        return self.distribution.plans_of(rows["input_ids"][:, self.prompt_length :].cpu())

    @property
    def signal_sizes(self) -> dict[str, int]:
        """How many values each signal has that a text can give."""
        return {attribute.name: len(attribute.values) for attribute in self.grammar.attributes}

    def signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: (N,)}: the value that each row's text gives of each attribute, -1 where it gives none."""
        plans = self.hidden_plans(rows).clamp(min=-1).to(rows["input_ids"].device)
        return {name: plans[:, a] for name, a in self.distribution.index.items()}

    def explain(self, response: Tensor, reveal: Tensor) -> list[str]:
        """What is wrong with a response (R,) to a prompt that reveals (A,); [] when nothing is."""
        words = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        return explain(self.distribution, response.cpu(), reveal.cpu(), words)

    def _style_words(self) -> tuple[Tensor, Tensor]:
        vocabulary = self.tokenizer.get_vocab()
        first, other = choices(self.grammar)
        return torch.tensor([vocabulary[w] for w in first]), torch.tensor([vocabulary[w] for w in other])

    def _draw(self, rows: int, generator: Generator) -> TensorRows:
        plans = self.distribution.sample_plans(rows, generator)
        texts = self.distribution.sample_texts(plans, generator)
        drawn = self._rows(self._hide(plans, generator), texts)
        return TensorRows(drawn.columns | signal_columns(self.signals(drawn.columns)))

    def _hide(self, plans: Tensor, generator: Generator) -> Tensor:
        """What each row's prompt reveals: fixed shares of all, part and none, in a fixed interleaving."""
        rows, attributes = plans.shape
        order = (torch.arange(rows) * 0.6180339887498949) % 1.0
        some = torch.rand(rows, attributes, generator=generator).argsort(-1)
        count = torch.randint(1, max(2, attributes), (rows, 1), generator=generator)
        shown = some < count
        shown[order < self.reveal_all] = True
        shown[order >= self.reveal_all + self.reveal_part] = False
        return torch.where(shown, plans, -1)

    def _rows(self, reveal: Tensor, texts: Tensor) -> TensorRows:
        vocabulary = self.tokenizer.get_vocab()
        prompt = torch.empty_like(reveal)
        for a, attribute in enumerate(self.grammar.attributes):
            ids = torch.tensor([vocabulary[token] for token in prompt_tokens(attribute)])
            prompt[:, a] = ids[reveal[:, a]]
        input_ids = torch.cat([prompt, texts], -1)
        response_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        response_mask[:, self.prompt_length :] = True
        return TensorRows(
            {
                "input_ids": input_ids,
                "attention_mask": torch.ones_like(response_mask),
                "response_mask": response_mask,
                "reveal": reveal,
            }
        )

    def _parse_prompt(self, prompt: str) -> Tensor:
        reveal = torch.full((self.prompt_length,), -1)
        for part in prompt.split():
            name, _, value = part.partition("=")
            attribute = next((a for a in self.grammar.attributes if a.name == name), None)
            if attribute is None or (value != "?" and value not in attribute.values):
                example = " ".join(f"{a.name}={a.values[0]}" for a in self.grammar.attributes)
                choices = "" if attribute is None else f"; {name} is one of {', '.join(attribute.values)} or ?"
                raise UsageError(f"prompt: “{part}” is not understood{choices}; type for example prompt='{example}'")
            if value != "?":
                reveal[self.distribution.index[name]] = attribute.values.index(value)
        return reveal


def prompt_tokens(attribute) -> list[str]:
    """The prompt's tokens of an attribute: one for each value and, last (index -1), the one that hides it."""
    return [f"{attribute.name}={value}" for value in attribute.values] + [f"{attribute.name}=?"]


def word_tokenizer(grammar: Grammar) -> PreTrainedTokenizerFast:
    """One id for every special token, prompt token and word of the grammar, split at spaces."""
    words = {w for t in grammar.templates for s in t.slots for value in s.words for w, _ in value}
    tokens = [*SPECIAL, *(token for a in grammar.attributes for token in prompt_tokens(a)), *sorted(words)]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, eos, mask, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        mask_token=mask,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
    )
