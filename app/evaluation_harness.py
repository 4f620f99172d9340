"""`--model leap` of lm-evaluation-harness: exported models of every kind, on its tasks.

    python -m app.evaluation_harness --model leap --model_args path=outputs/.../model --tasks gsm8k

takes every option of `lm_eval`. docs/evaluation_harness.md has a command for each kind of model. Nothing else imports lm_eval.
Legend: B batch, L columns, R response columns.
"""

import hashlib
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from types import TracebackType
from typing import Any

import torch
from lm_eval import utils
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Generator, Tensor
from tqdm import tqdm

from app.evaluated import EvaluationOptions, TextRequest, read_evaluated
from datamodules.batch import pack_prompt_response
from datamodules.template import PlainTemplate, RenderedTurns
from datamodules.tokenizer import end_ids
from models.backbones.checkpoint_files import parse_device
from models.diffusion.likelihood import fills_greedily, response_nll_draws
from models.functional.errors import UsageError
from models.functional.next_token import IGNORED, causal_text
from models.functional.nll import all_most_probable, chosen_nll
from models.functional.stop_strings import cut_at_stops, holds_stop
from models.interfaces.decoder import Decoder, forward_passes_of
from reporting.console import print_error

logger = logging.getLogger("lm_eval.leap")
LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names of tasks for the same number
OF_SAMPLING = ("top_p", "top_k", "min_p")  # they change no greedy text
IDS = tuple[list[int], list[int]]  # of a context and its continuation


@dataclass(frozen=True)
class Generation:
    """The generation options of a request. length: None where the task names none."""

    until: tuple[str, ...]
    length: int | None
    temperature: float

    @classmethod
    def of_task(cls, options: dict[str, Any]) -> "Generation":
        """Errors: UsageError for options that would change the texts and that no decoder here has."""
        until = options.get("until") or []
        length = next((int(options[name]) for name in LENGTHS if options.get(name) is not None), None)
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample") is False:
            temperature = 0.0
        elif options.get("do_sample") and options.get("temperature") is None:
            temperature = 1.0
        known = {"until", "do_sample", "temperature", *LENGTHS, *(() if temperature else OF_SAMPLING)}
        for name, value in options.items():
            if name not in known and value is not None and (name, value) != ("num_beams", 1):
                raise UsageError(
                    f"--gen_kwargs {name}={value}: --model leap generates greedily or at a temperature, without {name}; leave "
                    "it out, or type another task"
                )
        return cls(tuple([until] if isinstance(until, str) else until), length, temperature)


@register_model("leap")
class LeapHarness(TemplateLM):
    """Options are the fields of `EvaluationOptions`, in --model_args; batch_size and device are those of the command.

    Likelihoods are exact, or the Monte Carlo bound for a model that fills masks; other kinds refuse them. What a context has
    beyond the model's positions is cut from the left, as the harness does.
    """

    backend = "causal"

    def __init__(
        self,
        path: str,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        say_sentences()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UsageError(f"--batch_size {batch_size}: --model leap takes a number, such as --batch_size 8")
        folders = {name: str(options[name]) for name in ("target", "teacher") if options.get(name) is not None}
        try:  # the command makes a number of a folder named 2026
            self.options = EvaluationOptions(path=str(path), **options | folders)
        except TypeError as error:
            raise UsageError(
                f"--model_args: {str(error).partition('__init__() ')[2]}; the page evaluation_harness lists them"
            ) from None
        self.batch_size = int(batch_size)
        wanted = device or "cuda:0"  # which is what the command asks for where nothing is typed
        self._device = parse_device(wanted if torch.cuda.is_available() or "cuda" not in wanted else "cpu")
        self.evaluated = read_evaluated(self.options, self._device)
        self.tokenizer, self.max_length = self.evaluated.tokenizer, self.evaluated.context
        self.template, self.turns = self._layout(), RenderedTurns(self.tokenizer)
        self.ends = end_ids(self.tokenizer)
        self.chat = False  # whether prompts are turns in the chat template
        self.passes: list[float] = []  # forward passes of every text that was generated
        logger.info("%s, likelihood: %s", self.evaluated.kind, self.evaluated.likelihood)

    def _layout(self) -> PlainTemplate:
        """How a prompt becomes ids: as in the model's run where it is known."""
        run = {} if self.evaluated.run is None else self.evaluated.run.options
        plain = run.get("template") == "plain"
        if run.get("template", "plain") != "plain":
            logger.warning("this model was trained in a chat template; type --apply_chat_template")
        template = PlainTemplate(
            self.tokenizer,
            suffix=run.get("prompt_suffix", "") if plain else "",
            mark_end=plain and bool(run.get("mark_prompt_end")),
        )
        if self.options.add_bos_token is not None:
            template.begin = [self.prefix_token_id] if self.options.add_bos_token else []
        return template

    # -- what the harness asks for --------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def max_gen_toks(self) -> int:
        return self.options.max_gen_toks or self.evaluated.usual_length

    @property
    def tokenizer_name(self) -> str:
        return self.options.path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the results are of. Draws: of the likelihood of one request. Forward passes: of one text, on average."""
        found: dict[str, Any] = {"leap_kind": self.evaluated.kind, "likelihood": self.evaluated.likelihood}
        if self.evaluated.likelihood == "bound":
            found |= {"likelihood_draws": self.options.mc}
        if self.passes:
            found |= {"forward_passes_per_text": sum(self.passes) / len(self.passes)}
        weights = list(self.evaluated.network.parameters())
        return found | {"model_num_parameters": sum(map(Tensor.numel, weights)), "model_dtype": str(weights[0].dtype)}

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        self.chat = bool(chat_template)
        return super().chat_template(chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not isinstance(self.tokenizer.chat_template, str):
            raise UsageError(
                "--apply_chat_template: the tokenizer of this model has no chat template; leave the option out"
            )
        self.chat = True
        asked = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.turns.render(chat_history, **asked, enable_thinking=self.options.enable_thinking)

    # -- tokens ---------------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text: "<mask>" in it is six characters, but a template's own special tokens are special tokens."""
        if self.chat:
            return self.turns.encode(string)
        (ids,) = self.template.encode_responses([string])
        return ids if add_special_tokens is False else self.template.begin + ids

    def _encode_pair(self, context: str, continuation: str) -> IDS:
        if self.chat:
            return super()._encode_pair(context, self.turns.mark(continuation))
        if not (self.template.suffix or self.template.end):
            return super()._encode_pair(context, continuation)
        return self.template.encode_prompts([context])[0], self.template.encode_responses([continuation])[0]

    def _prompt(self, context: str, most: int) -> list[int]:
        """The ids of a context to generate from, its last `most` where it is longer."""
        ids = self.turns.encode(context) if self.chat else self.template.encode_prompts([context])[0]
        if len(ids) > most:
            logger.warning("a prompt of %d tokens is cut from the left to the %d that the model reads", len(ids), most)
        return ids[-most:] or [self.prefix_token_id]

    def _fitting(self, ids: IDS) -> IDS:
        """Context and continuation, the context cut from the left to what the model reads.

        Errors: UsageError for a continuation that leaves no column for a context.
        """
        context, continuation = ids
        # the last token of a continuation is read by a model that fills masks, and only predicted by others
        room = self.max_length - len(continuation) + (self.evaluated.next_token is not None)
        if room < 1:
            raise UsageError(
                f"a continuation of {len(continuation)} tokens does not fit the {self.max_length} positions of the model; "
                "leave its task out"
            )
        if len(context) > room:
            logger.warning("a context of %d tokens is cut from the left to the %d that fit", len(context), room)
        return context[-room:], continuation

    # -- likelihoods ----------------------------------------------------------------------------------------------------

    def _require_likelihood(self) -> None:
        found = self.evaluated
        if found.likelihood == "none":
            raise UsageError(f"path={self.options.path} is a {found.kind}: {found.no_likelihood}")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._require_likelihood()
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The sum over windows of a text, each with all of the context that fits."""
        self._require_likelihood()
        longest = self.max_length - (self.evaluated.next_token is None)
        windows: list[tuple[tuple[str, str] | None, list[int], list[int]]] = []
        owner = []
        for number, request in enumerate(requests):
            # a model that fills masks is not asked for the probability of a BOS that its tokenizer adds
            plain = {} if self.evaluated.next_token is not None else {"add_special_tokens": False}
            tokens = self.tok_encode(request.args[0], **plain)
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, longest, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (log_p, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting((context, continuation)) for _, context, continuation in requests]
        # the longest first: what does not fit into memory shows at once
        order = sorted(range(len(pairs)), key=lambda k: -sum(map(len, pairs[k])))
        together = self.batch_size if self.evaluated.next_token is not None else 1
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for chosen in chunks(order, together):
                own = [pairs[k] for k in chosen]
                if self.evaluated.next_token is not None:
                    scores = self._exact(own)
                else:  # nobody asks whether a window of a text is the greedy one
                    greedy = self.options.greedy and requests[chosen[0]][0] is not None
                    scores = [self._bound(*own[0], greedy=greedy)]
                for k, score in zip(chosen, scores, strict=True):
                    found[k] = score
                    if requests[k][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[k][0], score)
                bar.update(len(chosen))
        return [found[k] for k in range(len(pairs))]

    @torch.no_grad()
    def _exact(self, pairs: list[IDS]) -> list[tuple[float, bool]]:
        """log p(continuation | context) of each pair, and whether greedy generation gives the continuation."""
        assert self.evaluated.next_token is not None
        columns = max(len(context) + len(continuation) for context, continuation in pairs) - 1
        ids = torch.zeros(len(pairs), columns, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, (context, continuation) in enumerate(pairs):
            whole = torch.tensor(context + continuation)
            ids[row, : len(whole) - 1] = whole[:-1]
            labels[row, len(context) - 1 : len(whole) - 1] = whole[len(context) :]
        text = causal_text({"input_ids": ids.to(self._device), "labels": labels.to(self._device)})
        logits = self.evaluated.next_token(text)
        log_p = -chosen_nll(logits, text.targets, text.weights).double().sum(-1)
        return list(zip(log_p.tolist(), all_most_probable(logits, text.targets, text.weights).tolist(), strict=True))

    def _bound(self, context: list[int], continuation: list[int], *, greedy: bool) -> tuple[float, bool]:
        """A lower bound on log p(continuation | context), and whether greedy filling gives the continuation, if asked for.

        The draws are a function of seed and tokens: other requests and batches change nothing.
        """
        how, model = self.options, self.evaluated.fills_masks
        if not continuation:
            return 0.0, True
        row = self._rows([context], len(continuation), [continuation])
        digest = hashlib.sha256(repr((how.seed, context, continuation)).encode()).digest()
        generator = Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        draws = response_nll_draws(
            model, row, generator, samples=how.mc, batch_size=self.batch_size, guidance=how.guidance
        )
        return -float(draws.mean()), greedy and fills_greedily(model, row, how.guidance)

    # -- texts ----------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to their stop strings. Prompts with the same options share batches."""
        groups: dict[Generation, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[Generation.of_task(request.args[1])].append(number)
        generator = Generator(device=self._device).manual_seed(self.options.seed)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for how, members in groups.items():
                length = how.length or self.max_gen_toks
                decoder, room = self._decoder(how, length), self.max_length - length
                prompts = {k: self._prompt(requests[k].args[0], room) for k in members}
                for chosen in chunks(sorted(members, key=lambda k: -len(prompts[k])), self.batch_size):
                    found = decoder(self._rows([prompts[k] for k in chosen], length), generator)
                    self.passes += forward_passes_of(decoder, len(chosen)).tolist()
                    for k, ids in zip(chosen, found.tolist(), strict=True):
                        texts[k] = cut_at_stops(self._text(ids), how.until)
                        self.cache_hook.add_partial("generate_until", requests[k].args, texts[k])
                    bar.update(len(chosen))
        return [texts[k] for k in range(len(requests))]

    def _decoder(self, how: Generation, length: int) -> Decoder:
        if length >= self.max_length:
            raise UsageError(
                f"a response of {length} tokens leaves no room for a prompt in the {self.max_length} positions of the model; "
                f"type --gen_kwargs max_gen_toks={self.max_length // 2}"
            )
        stop = (lambda tokens: holds_stop(tokens, self._text, how.until)) if any(how.until) else None
        return self.evaluated.decoder(TextRequest(length, how.temperature, stop))

    def _text(self, ids: list[int]) -> str:
        """The text of response ids up to their end, without special tokens."""
        own = list(takewhile(lambda token: token not in self.ends, ids))
        return self.tokenizer.decode(own, skip_special_tokens=True)

    def _rows(
        self, prompts: list[list[int]], length: int, responses: list[list[int]] | None = None
    ) -> dict[str, Tensor]:
        """Rows (B, L): prompts padded on the left, then `length` response columns."""
        rows = pack_prompt_response(
            prompts,
            responses or [[] for _ in prompts],
            prompt_length=max(map(len, prompts)),
            response_length=length,
            pad_id=self.tokenizer.pad_token_id,
            eos_id=self.eot_token_id,
        )
        return {name: column.to(self._device) for name, column in rows.items()}


def chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def say_sentences() -> None:
    """Show an error that a user can correct as a sentence: the harness has no place of its own for that."""
    usual = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UsageError):
            print_error(str(error))
        else:
            usual(kind, error, trace)

    sys.excepthook = show


if __name__ == "__main__":
    say_sentences()
    cli_evaluate()
