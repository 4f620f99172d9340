"""What every executor reads: [<BOS>, plan, <TEXT>] and columns of text behind it.

Legend: B batch, C columns of a plan's block, T text columns, D width.
"""

import torch
from torch import Tensor

from models.plans.layout import Columns, joined
from models.plans.unified import UnifiedModel

Read = tuple[Tensor, Columns]  # embeddings (B, L, D) and what the columns are


def opening(model: UnifiedModel, ids: Tensor, embeds: Tensor) -> Read:
    """[<BOS>, plan, <TEXT>] of a plan's block, ids (B, C) and embeddings (B, C, D)."""
    v, layout = model.layout.vocabulary, model.layout
    bos, text = layout.of_special(ids), layout.of_special(ids, layout.text_start)
    first, last = (
        model.embed(torch.full_like(ids[:, :1], token), c.type_ids) for token, c in ((v.bos, bos), (v.text, text))
    )
    return torch.cat([first, embeds, last], 1), joined(bos, layout.of_block(ids), text)


def text_columns(model: UnifiedModel, ids: Tensor, first: int = 0) -> Read:
    """Text (B, T) whose first token is number `first`."""
    columns = model.layout.of_text(torch.ones_like(ids, dtype=torch.bool))
    columns = columns._replace(position_ids=columns.position_ids + first)
    return model.embed(ids, columns.type_ids), columns
