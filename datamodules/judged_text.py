"""Generated tokens as a judge reads them: as they are where it has the same vocabulary, else as text in its own tokens."""

from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from datamodules.plain_text import plain_backend
from models.functional.errors import UsageError
from models.functional.generated_text import JudgedText, TextNats, counted_tokens
from models.functional.next_token import EndIds, as_end_ids


class TextJudge(Protocol):
    """What a judge has to offer, see `models.backbones.judge.Judge`."""

    tokenizer: Any

    def __call__(self, texts: list[JudgedText]) -> TextNats: ...


class JudgeOf:
    """Responses (N, R) of one vocabulary -> `TextNats` of a judge.

    ends: the tokens of `tokenizer` that stand between documents.
    In the judge's own vocabulary every token after the first counts. Otherwise texts are decoded, and tokenised by the judge:
    each of `ends` becomes the judge's end token, and `counted_tokens` says what counts. A special token that a text spells
    stays characters.
    Errors: UsageError for a judge of another vocabulary whose tokenizer has no end token, or is no fast one.
    """

    def __init__(self, judge: TextJudge, tokenizer: PreTrainedTokenizerFast, ends: EndIds) -> None:
        self.judge, self.tokenizer, self.ends = judge, tokenizer, set(as_end_ids(ends))
        self.same = judge.tokenizer.get_vocab() == tokenizer.get_vocab()
        if self.same:
            return
        if judge.tokenizer.eos_token_id is None or not judge.tokenizer.is_fast:
            raise UsageError(
                "data.judge.path: a judge of another vocabulary than the corpus' needs a fast tokenizer with an eos_token; "
                "type another judge, or data.tokenizer=<the judge's folder>"
            )
        self._encode = plain_backend(judge.tokenizer).encode_batch_fast
        # a judge that begins texts with a token of its own, such as Llama's <s>, is given it
        begin = judge.tokenizer("").input_ids[:1]
        self._begin = [token for token in begin if token == judge.tokenizer.bos_token_id]

    def __call__(self, responses: Tensor) -> TextNats:
        rows = responses.tolist()
        if self.same:
            return self.judge([JudgedText(ids, [k > 0 for k in range(len(ids))]) for ids in rows])
        return self.judge([self._text(ids) for ids in rows])

    def _text(self, ids: list[int]) -> JudgedText:
        """The row's documents in the judge's tokens, with its end token between them."""
        documents: list[list[int]] = [[]]
        for token in ids:
            if token in self.ends:
                documents.append([])
            else:
                documents[-1].append(token)
        encoded = self._encode([self.tokenizer.decode(own) for own in documents], add_special_tokens=False)
        end = self.judge.tokenizer.eos_token_id
        joined = [*self._begin, *encoded[0].ids]
        for document in encoded[1:]:
            joined += [end, *document.ids]
        return JudgedText(joined, counted_tokens(joined, end))
