"""A causal LM whose middle layers read concepts alone: v2, online concept compression.

Legend: B batch, T positions, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from models.functional.attention import positions_from_mask
from models.functional.errors import UsageError
from models.online.attention import use_attention
from models.online.concept_stack import CompressionSchedule, ConceptStack, Level
from models.online.layer_stack import nested_split, require_layout, require_same, require_split, suggested_split
from models.online.stack_state import StackState

# ends of names
KEPT_BUFFERS = ("router.offset", "codes.space.codes", "codes.space.counts", "codes.space.sums")


class OnlineConceptModel(nn.Module):
    """backbone: a causal LM of transformers in the layout of Llama and Qwen3, whole or with adapters.

    split: layers of [shallow, middle, deep], None is 2 : 3 : 2; levels: 2 splits the middle again in the same proportions.
    growth: which positions commit (router.GROWTH); most_nulls: NULLs that may follow each other; codes: of the concepts,
    chosen as `sampler` says (`quantiser.Sampler`).
    gate: how the decision to commit gets its gradient (concept_stack.GATES). carry: whether a tail position reads the concept
    before it at once; pool: whether a concept reads the mean of the tail that it ends.
    attention: sdpa, or flex for long texts on a GPU.
    The setting last trained with is kept in buffers, beside the routers' offsets.
    """

    def __init__(
        self,
        backbone: nn.Module,
        split: list | None = None,
        *,
        levels: int = 1,
        growth: str = "null",
        gate: str = "slot",
        codes: int = 4096,
        sampler: str = "gumbel_st",
        most_nulls: int = 15,
        compression: float = 4.0,
        quantisation: float = 1.0,
        carry: bool = True,
        pool: bool = True,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        decoder = require_layout(backbone)
        use_attention(backbone, attention, gate)
        split = suggested_split(len(decoder.layers)) if split is None else list(split)
        require_split(split, len(decoder.layers))
        if levels < 1 or (levels > 1 and isinstance(split[1], list)):
            raise UsageError(
                f"module.levels={levels} splits the middle itself; type module.levels=1, or a number in module.split={split}"
            )
        split = nested_split(split, levels)
        require_split(split, len(decoder.layers))
        table = backbone.get_input_embeddings().weight
        like = {"device": table.device, "dtype": table.dtype}
        self.backbone, self.split, self.levels = backbone, split, levels
        options = {"growth": growth, "gate": gate, "codes": codes, "sampler": sampler, "most_nulls": most_nulls}
        options |= {"carry": carry, "pool": pool, "attention": attention}
        embedding_std = table.detach().float().std().item()  # codes start as loud as words
        self.stack = ConceptStack(
            decoder, split, **options, embedding_std=embedding_std, read_out=self.read_out, **like
        )
        # (compression, quantisation)
        self.register_buffer(
            "setting", torch.tensor([compression, quantisation], dtype=torch.float64, device=table.device)
        )
        self.options = {"split": split, **options}
        self._require_same()

    @property
    def config(self) -> PreTrainedConfig:
        return self.backbone.config

    # -- a whole text -------------------------------------------------------------------------------------------------

    def read(
        self,
        ids: Tensor,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
        schedule: CompressionSchedule | None = None,
        state: StackState | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, list[Level]]:
        """States (B, T, D) after the last norm, and what each level did.

        ids (B, T); valid (B, T) bool is False on padding, left or right; positions (B, T), None counts what is valid.
        documents (B, T): which one a position belongs to, None where each row is one text; `positions` count from 0 in each.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        positions = positions_from_mask(valid) if positions is None else positions
        schedule = self.kept_setting() if schedule is None else schedule
        if documents is not None and bool((documents == documents[:, :1]).all()):
            documents = None
        embeds = self.backbone.get_input_embeddings()(ids)
        states, levels = self.stack.read(embeds, positions, valid, schedule, state, documents)
        return self.backbone.get_decoder().norm(states), levels

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each position."""
        return self.logits(self.read(input_ids, None if attention_mask is None else attention_mask.bool())[0])

    def logits(self, states: Tensor) -> Tensor:
        return self.backbone.get_output_embeddings()(states)

    def read_out(self, states: Tensor) -> Tensor:
        """Logits of states that have not been normed yet."""
        return self.logits(self.backbone.get_decoder().norm(states))

    # -- one token a row ----------------------------------------------------------------------------------------------

    def start(self, batch: int) -> StackState:
        """Nothing read yet, of so many rows."""
        return StackState(self.stack, batch, self.setting.device)

    def step(
        self, ids: Tensor, positions: Tensor, state: StackState, schedule: CompressionSchedule | None = None
    ) -> Tensor:
        """The next token (B,) of every row at positions (B,) -> logits (B, V) of the one after it."""
        rows = torch.arange(len(ids), device=ids.device)
        embeds = self.backbone.get_input_embeddings()(ids.unsqueeze(1))
        schedule = self.kept_setting() if schedule is None else schedule
        states = self.stack.step(embeds, positions.unsqueeze(1), state, rows, schedule)
        return self.logits(self.backbone.get_decoder().norm(states))[:, 0]

    # -- setting ------------------------------------------------------------------------------------------------------

    def kept_setting(self) -> CompressionSchedule:
        """What was last trained with, without noise."""
        compression, quantisation = self.setting.tolist()
        return CompressionSchedule(compression, quantisation)

    def keep_setting(self, compression: float, quantisation: float) -> None:
        self.setting.copy_(torch.tensor([compression, quantisation]))

    def kept_buffers(self) -> set[str]:
        """Names of the buffers that a checkpoint has to keep: no gradient trains them, and no other file has them."""
        return {name for name, _ in self.named_buffers() if name == "setting" or name.endswith(KEPT_BUFFERS)}

    def stacks(self) -> list[ConceptStack]:
        """One for each level, the outermost first."""
        found, stack = [], self.stack
        while stack is not None:
            found.append(stack)
            stack = stack.inner
        return found

    @torch.no_grad()
    def _require_same(self) -> None:
        """Without compression this is the backbone: checked on a few tokens before anything is trained."""
        was_training = self.backbone.training
        self.eval()
        ids = torch.arange(4, device=self.setting.device).unsqueeze(0)
        states, _ = self.read(ids, schedule=CompressionSchedule(compression=1.0, quantisation=0.0))
        require_same(self.backbone(input_ids=ids, use_cache=False).logits, self.logits(states))
        self.stack.train()  # what is new is trained, whatever mode the backbone came in
        self.backbone.train(was_training)
