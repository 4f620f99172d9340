"""A drafter without a network: the token that followed the last n-gram when it last occurred (prompt lookup).

Legend: B batch, L columns, V vocabulary.
"""

import torch
from torch import Tensor


class NgramScores:
    """(ids (B, L), lengths (B,), count) -> log p (B, count, V), with all probability on one token at each position.

    The token is the one that followed the latest earlier occurrence of the last n tokens, n from `longest` down to 1. Without
    such an occurrence it is the last token. A proposal x of probability 1 is accepted with probability q*(x).
    """

    def __init__(self, vocab_size: int, longest: int = 3) -> None:
        self.vocab_size, self.longest = vocab_size, longest

    def __call__(self, ids: Tensor, lengths: Tensor, count: int) -> Tensor:
        proposed = torch.stack([self._proposal(ids, lengths + k) for k in range(count)], 1)  # (B, count)
        logp = torch.full((*proposed.shape, self.vocab_size), -torch.inf, device=ids.device)
        return logp.scatter(-1, proposed.unsqueeze(-1), 0.0)

    def _proposal(self, ids: Tensor, end: Tensor) -> Tensor:
        """The proposal (B,) for position end (B,)."""
        proposal = ids.gather(1, end.unsqueeze(-1) - 1).squeeze(-1)
        for n in range(1, self.longest + 1):  # a longer match replaces a shorter one
            start = torch.arange(ids.shape[1] - n, device=ids.device)
            same = torch.ones(len(ids), len(start), dtype=torch.bool, device=ids.device)
            for back in range(n):
                token = ids.gather(1, (end - n + back).clamp(min=0).unsqueeze(-1))
                same &= ids[:, back : back + len(start)] == token
            same &= (start + n < end.unsqueeze(-1)) & (end.unsqueeze(-1) > n)
            latest = torch.where(same, start, -1).amax(-1)
            follows = ids.gather(1, (latest + n).clamp(min=0).unsqueeze(-1)).squeeze(-1)
            proposal = torch.where(latest >= 0, follows, proposal)
        return proposal
