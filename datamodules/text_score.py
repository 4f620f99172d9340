"""Quality of texts generated without a prompt: their likelihood under a judge model, and their diversity."""

from collections.abc import Callable

from torch import Tensor

from datamodules.score import Score
from models.functional.generated_text import (
    TextNats,
    distinct_ngrams,
    generative_perplexity,
    text_entropy,
    unigram_entropy,
)
from models.functional.monitor import distinct_share


class TextScorer:
    """Scores responses (N, R).

    judge: texts (N, R) -> `TextNats`, see `JudgeOf`; None leaves the perplexity out.

    judge_perplexity: exp of the judge's mean nats over all tokens that count; its interval takes texts as independent. None
        where no token counts.
    text_entropy: nats of the tokens within a text; unigram_entropy: of all texts together. A perplexity below that of
        held-out text is only good where these are not below it too.
    distinct_2, distinct_3: different n-grams among all.
    """

    def __init__(self, judge: Callable[[Tensor], TextNats] | None = None) -> None:
        self.judge = judge

    def __call__(self, rows: dict[str, Tensor], responses: Tensor) -> Score:
        quality: dict[str, float | None] = {
            "text_entropy": text_entropy(responses),
            "unigram_entropy": unigram_entropy(responses),
            "distinct_2": distinct_ngrams(responses, 2),
            "distinct_3": distinct_ngrams(responses, 3),
        }
        score = Score(quality=quality, distinct=distinct_share(responses.unsqueeze(0)))
        if self.judge is not None:
            found = generative_perplexity(self.judge(responses))
            quality["judge_perplexity"] = None if found is None else found[0]
            if found is not None and found[1] is not None:
                score.ci95["judge_perplexity"] = found[1]
        return score
