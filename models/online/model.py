"""A causal LM whose middle layers read concepts alone.

Legend: B batch, T positions, D width, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from models.backbones.added_layers import added_like
from models.backbones.causal_lm import output_logits
from models.functional.attention import positions_from_mask
from models.online.attention import use_attention
from models.online.concept_stack import CompressionSettings, ConceptStack, Level
from models.online.layer_stack import require_layout, require_same, whole_split
from models.online.options import OnlineModelOptions
from models.online.stack_state import StackState

# ends of names
KEPT_BUFFERS = ("router.offset", "codes.space.codes", "codes.space.counts", "codes.space.sums")


class OnlineConceptModel(nn.Module):
    """backbone: a causal LM of transformers in the layout of Llama and Qwen3, whole or with adapters.

    options: see `OnlineModelOptions`; changes: some of them by name.
    compression, quantisation: used where no settings are given, until `set_inference_settings` changes them. They are a
    buffer of the checkpoint, as the routers' offsets are.
    """

    def __init__(
        self,
        backbone: nn.Module,
        options: OnlineModelOptions | None = None,
        *,
        compression: float = 4.0,
        quantisation: float = 1.0,
        **changes,
    ) -> None:
        super().__init__()
        options = replace(options or OnlineModelOptions(), **changes).of_model()
        decoder = require_layout(backbone)
        use_attention(backbone, options.attention, options.gate)
        split = whole_split(options.split, options.levels, len(decoder.layers))
        table = backbone.get_input_embeddings().weight
        like = added_like(table)
        self.backbone, self.split = backbone, split
        self.options = replace(options, split=split, levels=1)  # of a saved model: `split` has all levels
        embedding_std = table.detach().float().std().item()  # embeddings of codes start as wide as those of tokens
        self.stack = ConceptStack(decoder, split, options, embedding_std=embedding_std, read_out=self.read_out, **like)
        # (compression, quantisation)
        self.register_buffer(
            "setting", torch.tensor([compression, quantisation], dtype=torch.float64, device=table.device)
        )
        self._require_same()

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self.backbone.get_input_embeddings().weight.dtype

    @property
    def config(self) -> PreTrainedConfig:
        return self.backbone.config

    # -- a whole text -------------------------------------------------------------------------------------------------

    def read(
        self,
        ids: Tensor,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
        settings: CompressionSettings | None = None,
        state: StackState | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, list[Level]]:
        """Hidden states (B, T, D) after the last norm, and the result of each level.

        ids (B, T); valid (B, T) bool is False on padding, left or right; positions (B, T), None counts what is valid.
        documents (B, T): which one a position belongs to, None where each row is one text; `positions` count from 0 in each.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        positions = positions_from_mask(valid) if positions is None else positions
        settings = self.inference_settings() if settings is None else settings
        if documents is not None and bool((documents == documents[:, :1]).all()):
            documents = None
        embeds = self.backbone.get_input_embeddings()(ids)
        states, levels = self.stack.read(embeds, positions, valid, settings, state, documents, ids)
        return self.backbone.get_decoder().norm(states), levels

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each position."""
        return self.logits(self.read(input_ids, None if attention_mask is None else attention_mask.bool())[0])

    def logits(self, states: Tensor) -> Tensor:
        return output_logits(self.backbone, states)

    def read_out(self, states: Tensor) -> Tensor:
        """Logits of hidden states before the last norm."""
        return self.logits(self.backbone.get_decoder().norm(states.to(self.dtype)))

    # -- one token a row ----------------------------------------------------------------------------------------------

    def start(self, batch: int) -> StackState:
        """Empty caches for so many rows."""
        return StackState(self.stack, batch, self.setting.device, self.dtype)

    def step(
        self, ids: Tensor, positions: Tensor, state: StackState, settings: CompressionSettings | None = None
    ) -> Tensor:
        """The next token (B,) of every row at positions (B,) -> logits (B, V) of the one after it."""
        rows = torch.arange(len(ids), device=ids.device)
        embeds = self.backbone.get_input_embeddings()(ids.unsqueeze(1))
        settings = self.inference_settings() if settings is None else settings
        states = self.stack.step(embeds, positions.unsqueeze(1), state, rows, settings, ids.unsqueeze(1))
        return self.logits(self.backbone.get_decoder().norm(states))[:, 0]

    # -- settings -----------------------------------------------------------------------------------------------------

    def inference_settings(self) -> CompressionSettings:
        """Compression and quantisation last trained with, without noise."""
        compression, quantisation = self.setting.tolist()
        return CompressionSettings(compression, quantisation)

    def set_inference_settings(self, compression: float, quantisation: float) -> None:
        self.setting.copy_(torch.tensor([compression, quantisation]))

    def kept_buffers(self) -> set[str]:
        """Names of the buffers that a checkpoint has to keep: no gradient trains them, and no other file has them."""
        return {name for name, _ in self.named_buffers() if name == "setting" or name.endswith(KEPT_BUFFERS)}

    def stacks(self) -> list[ConceptStack]:
        """One for each level, the outermost first."""
        found: list[ConceptStack] = []
        stack: ConceptStack | None = self.stack
        while stack is not None:
            found.append(stack)
            stack = stack.inner
        return found

    @torch.no_grad()
    def _require_same(self) -> None:
        """Without compression this is the backbone: checked on four tokens. Raises UsageError where it is not."""
        was_training = self.backbone.training
        self.eval()
        ids = torch.arange(4, device=self.setting.device).unsqueeze(0)
        states, _ = self.read(ids, settings=CompressionSettings(compression=1.0, quantisation=0.0))
        require_same(self.backbone(input_ids=ids, use_cache=False).logits, self.logits(states))
        self.stack.train()  # new weights train, in whichever mode the backbone came
        self.backbone.train(was_training)
