"""Strings that end a generated text.

Legend: B batch, n tokens generated so far.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """The text before its stop strings. Each of them in turn cuts what those before it have left; an empty one cuts nothing.

    This is the convention of lm-evaluation-harness.
    """
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text


def holds_stop(tokens: Tensor, decode: Callable[[list[int]], str], stops: Sequence[str]) -> Tensor:
    """Whether the text of each row (B, n) holds a stop string, (B,) bool.

    Asked after every token, it decodes a whole row only where the row's last tokens spell a stop string: one of k bytes is
    spelled by k tokens at most.
    """
    stops = [stop for stop in stops if stop]
    last = max((len(stop.encode()) for stop in stops), default=0)
    found = [
        any(stop in decode(row[-last:]) for stop in stops) and any(stop in decode(row) for stop in stops)
        for row in tokens.tolist()
    ]
    return torch.tensor(found, dtype=torch.bool, device=tokens.device)
