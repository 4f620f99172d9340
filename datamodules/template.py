"""How a prompt and its response become one row of ids: as plain text, or in the chat template of a model.

The same object encodes rows for training and evaluation and prompts for generation, and takes its parts off again.
A text is text: a special token that it spells is encoded as the characters it is written with.
"""

import re
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from datamodules.plain_text import plain_backend
from models.functional.errors import UsageError

AS_TEXT = "\ue002"  # inside a special token that a text spells: it stays text
PROMPT, RESPONSE = "\ue000", "\ue001"  # of the private use area: they stand for the texts, and no template changes them


class Template(Protocol):
    """What surrounds a prompt and precedes its response."""

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        """The ids of everything before the response."""
        ...

    def encode_responses(self, responses: list[str]) -> list[list[int]]:
        """The ids of the response, without its end token."""
        ...

    def decode_prompt(self, ids: list[int]) -> str:
        """The prompt that `encode_prompts` was given."""
        ...


class PlainTemplate:
    """[BOS] prompt, suffix, [EOS], response. BOS stands where the tokenizer puts one before every text.

    suffix: text after every prompt. mark_end: an end-of-text token follows it, from which response positions can count.
    begin: whether BOS is written; our own tokenizers have none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        suffix: str = "",
        mark_end: bool = False,
        begin: bool = True,
    ) -> None:
        self.tokenizer, self.suffix = tokenizer, suffix
        self.begin = first_ids(tokenizer) if begin else []
        self.end = [tokenizer.eos_token_id] if mark_end else []
        self._backend = plain_backend(tokenizer)

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        ids = self.encode_responses([prompt + self.suffix for prompt in prompts])
        return [self.begin + own + self.end for own in ids]

    def encode_responses(self, responses: list[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch_fast(responses, add_special_tokens=False)]

    def decode_prompt(self, ids: list[int]) -> str:
        ids = ids[len(self.begin) : len(ids) - len(self.end)]
        return self.tokenizer.decode(ids).removesuffix(self.suffix)


class ChatTemplate:
    """The chat template of the tokenizer: one turn of the user, and one of the assistant, which is the response.

    Prompt ids are those of `tokenizer.apply_chat_template([user turn], add_generation_prompt=True)`, with
    `enable_thinking=False` for the templates that know it. Response ids are those of the assistant's text, up to the token
    that ends a turn. That token becomes the end token of the tokenizer. Errors: UsageError for a template that cannot be
    taken apart in this way.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._backend = plain_backend(tokenizer)
        self._special = special_tokens(tokenizer)
        asked = self._render(PROMPT)
        self.before, _, self.after = asked.partition(PROMPT)
        self.strips = self._render(f" {PROMPT} ") == asked
        answered = self._render(PROMPT, RESPONSE)
        between, _, ending = answered.removeprefix(asked).partition(RESPONSE)
        end = self._special.match(ending)
        if asked.count(PROMPT) != 1 or not answered.startswith(asked) or between or end is None:
            raise UsageError(
                "data.template: the chat template of this tokenizer does not put a response straight behind its generation "
                "prompt and end it with a special token; type data.template=plain, or data.template=FILE.jinja with one that "
                "does"
            )
        self.end = tokenizer.convert_tokens_to_ids(end.group())
        if tokenizer.eos_token_id != self.end:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.end)

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        return [self._encode_prompt(prompt.strip() if self.strips else prompt) for prompt in prompts]

    def encode_responses(self, responses: list[str]) -> list[list[int]]:
        texts = [text.strip() for text in responses] if self.strips else responses
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode_prompt(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids).removeprefix(self.before).removesuffix(self.after)

    def _encode_prompt(self, prompt: str) -> list[int]:
        if not self._special.search(prompt):
            whole = self.before + prompt + self.after
            return self.tokenizer(whole, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        # Only the template's own special tokens are read as such. Tokenizers split a text at them before all else, so the
        # parts between them can be encoded one by one.
        parts = [*self._parts(self.before), *self._parts(self.after)]
        joint = len(self._parts(self.before)) - 1
        parts[joint : joint + 2] = [parts[joint] + prompt + parts[joint + 1]]
        ids: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            elif part:
                ids += self._backend.encode(part, add_special_tokens=False).ids
        return ids

    def _parts(self, text: str) -> list[str]:
        """Text, special token, text, special token ... text."""
        return re.split(f"({self._special.pattern})", text)

    def _render(self, prompt: str, response: str | None = None) -> str:
        turns = [{"role": "user", "content": prompt}]
        turns += [] if response is None else [{"role": "assistant", "content": response}]
        asked: dict[str, Any] = {"tokenize": False, "add_generation_prompt": response is None, "enable_thinking": False}
        try:
            return self.tokenizer.apply_chat_template(turns, **asked)
        except Exception as error:  # a template may raise anything
            raise UsageError(
                f"data.template: the chat template cannot be used ({str(error).splitlines()[0]}); type data.template=plain, or "
                "data.template=FILE.jinja with another one"
            ) from error


def build_template(
    kind: str, tokenizer: PreTrainedTokenizerFast, *, suffix: str = "", mark_end: bool = False, begin: bool = True
) -> Template:
    """The template of `data.template=kind`: `plain`, `chat` (the tokenizer's own), or the path of a jinja file.

    A file's text becomes the tokenizer's chat template, and so is kept with a run and written beside its model.
    suffix, mark_end, begin: of `PlainTemplate`; a chat template ends prompts in its own way. Errors: UsageError.
    """
    if kind == "plain":
        return PlainTemplate(tokenizer, suffix=suffix, mark_end=mark_end, begin=begin)
    if kind != "chat":
        tokenizer.chat_template = template_text(kind)
    if not isinstance(tokenizer.chat_template, str):
        named = isinstance(tokenizer.chat_template, dict)
        raise UsageError(
            f"data.template=chat: the tokenizer has {'several chat templates' if named else 'no chat template'}; type "
            "data.template=plain, or data.template=FILE.jinja"
        )
    return ChatTemplate(tokenizer)


def template_text(path: str) -> str:
    """The text of a jinja file. Errors: UsageError."""
    file = Path(path).expanduser()
    if file.suffix not in (".jinja", ".jinja2", ".j2") or not file.is_file():
        raise UsageError(
            f"data.template={path} is neither plain nor chat nor a .jinja file that exists; type one of these"
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data.template={path} cannot be read ({error}); type another file") from error


def first_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer puts before every text: [BOS] or nothing."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else []


class RenderedTurns:
    """Turns in the chat template of a tokenizer, as one text and as ids, for whoever passes texts on instead of ids.

    The text of `render` has the mark `AS_TEXT` inside special tokens that a turn's own text spells, so that `encode` tells
    them from the template's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.backend = tokenizer, plain_backend(tokenizer)
        self.special = special_tokens(tokenizer)

    def mark(self, text: str) -> str:
        """The text with the mark behind the first character of each special token that it spells."""
        return self.special.sub(lambda found: found[0][0] + AS_TEXT + found[0][1:], text)

    def render(self, turns: list[dict[str, str]], **asked: Any) -> str:
        """asked: arguments of `apply_chat_template`. Errors: UsageError for a template that refuses the turns."""
        own = [turn | {"content": self.mark(turn["content"])} for turn in turns]
        try:
            return self.tokenizer.apply_chat_template(own, tokenize=False, **asked)
        except Exception as error:  # a template may raise anything
            raise UsageError(
                f"the chat template refuses these turns ({str(error).splitlines()[0]}); leave the chat template out, or the "
                "system turn"
            ) from error

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered text, nothing added."""
        if AS_TEXT not in text:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        ids: list[int] = []
        for number, part in enumerate(re.split(f"({self.special.pattern})", text)):
            if number % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            elif part:
                ids += self.backend.encode(part.replace(AS_TEXT, ""), add_special_tokens=False).ids
        return ids


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Finds the special tokens of a tokenizer in a text, the longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
