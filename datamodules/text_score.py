"""Quality of texts generated without a prompt: their likelihood under a judge model, and their diversity."""

import math
from collections.abc import Callable

from torch import Tensor

from datamodules.score import Score
from models.functional.generated_text import distinct_ngrams, text_entropy, unigram_entropy
from models.functional.monitor import distinct_share


class TextScorer:
    """Scores responses (N, R).

    judge: texts (N, R) -> nats (N, R - 1) of each token given those before it; None leaves the perplexity out.

    judge_perplexity: exp of the judge's mean nats per token; its interval takes texts as independent.
    text_entropy: nats of the tokens within a text; unigram_entropy: of all texts together. A perplexity below that of
        held-out text is only good where these are not below it too.
    distinct_2, distinct_3: different n-grams among all.
    """

    def __init__(self, judge: Callable[[Tensor], Tensor] | None = None) -> None:
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
            nats = self.judge(responses).double().mean(-1)  # (N,): every text has as many tokens
            quality["judge_perplexity"] = nats.mean().exp().item()
            if len(nats) > 1:
                half = 1.96 * nats.std().item() / math.sqrt(len(nats))
                mean = nats.mean().item()
                score.ci95["judge_perplexity"] = (math.exp(mean - half), math.exp(mean + half))
        return score
