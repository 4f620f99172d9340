"""MDLM's body: a diffusion transformer in which every token sees every other one, conditioned by adaptive layer norms.

The published models (kuleshov-group/mdlm-owt and those of the same shape; Sahoo et al., 2406.07524) were trained with the time
held at 0, so that a text with masks is all that it reads. Names of weights and fields of config.json are the published ones.
Legend: B batch, L length, D width, C width of the condition, V vocabulary, H heads, d width of a head.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import rotate_half

from models.backbones import checkpoint_files as files
from models.backbones.dit_layout import MDLM, config_from_mdlm
from models.backbones.llada import Prefix
from models.functional.attention import (
    bidirectional_attention,
    gated_prefix_attention,
    padding_mask,
    positions_from_mask,
)
from models.functional.errors import UsageError
from models.functional.precision import at_least_float32

ROTARY_BASE = 10_000.0
FREQUENCIES = 256  # that a time is embedded in, sines and cosines together
FEED_FORWARD = 4  # times the width


class DitConfig(PreTrainedConfig):
    """The published fields, and the id of the mask. None: a model that fills no masks, such as Duo's."""

    model_type = MDLM
    attribute_map = {  # noqa: RUF012
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }

    def __init__(
        self,
        vocab_size: int = 50_258,
        model_length: int = 1024,
        hidden_dim: int = 768,
        cond_dim: int = 128,
        n_blocks: int = 12,
        n_heads: int = 12,
        mask_token_id: int | None = None,
        **kwargs,
    ) -> None:
        self.vocab_size, self.model_length, self.hidden_dim = vocab_size, model_length, hidden_dim
        self.cond_dim, self.n_blocks, self.n_heads = cond_dim, n_blocks, n_heads
        self.mask_token_id = mask_token_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


def time_embedding(sigma: Tensor, width: int = FREQUENCIES) -> Tensor:
    """(B,) -> (B, width): cosines, then sines, of sigma times frequencies 10,000^(-k / half) (Vaswani et al., 2017)."""
    half = width // 2
    rates = torch.exp(-math.log(1e4) / half * torch.arange(half, device=sigma.device, dtype=sigma.dtype))
    angles = sigma.unsqueeze(-1) * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, the adaptive part of a layer norm (Peebles and Xie, 2212.09748)."""
    return x * (1 + scale) + shift


class LayerNorm(nn.Module):
    """A layer norm without bias, computed in float32 for half precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(at_least_float32(x), self.weight.shape).to(x.dtype) * self.weight


class TokenTable(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(rows, width) / math.sqrt(width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)


class TimeMap(nn.Module):
    """sigma (B,) -> the condition before its last nonlinearity, (B, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma: Tensor) -> Tensor:
        return self.mlp(time_embedding(at_least_float32(sigma)).to(self.mlp[0].weight.dtype))


class DitBlock(GradientCheckpointingLayer):
    """Attention and a feed-forward network, each behind a norm that the condition shifts and scales, and a gate."""

    def __init__(self, width: int, heads: int, condition: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        inner = FEED_FORWARD * width
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))
        self.adaLN_modulation = nn.Linear(condition, 6 * width)

    def forward(
        self, x: Tensor, condition: Tensor, turn: tuple[Tensor, Tensor], visible: Tensor, prefix: Prefix | None
    ) -> Tensor:
        """x (B, L, D), condition (B or 1, C), cosines and sines (B, 1, L, d), visible (B, 1, L, L); prefix of this layer."""
        parts = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate * self.attn_out(self._attend(modulate(self.norm1(x), shift, scale), turn, visible, prefix))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def _attend(self, x: Tensor, turn: tuple[Tensor, Tensor], visible: Tensor, prefix: Prefix | None) -> Tensor:
        q, k, v = self.attn_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, L, d)
        cos, sin = (part.to(q.dtype) for part in turn)
        q, k = (part * cos + rotate_half(part) * sin for part in (q, k))
        scale = q.shape[-1] ** -0.5
        if prefix is None:
            out = bidirectional_attention(q, k, v, visible, scale)
        else:
            keys, values, passes = (part.to(q.dtype) for part in prefix)
            out = gated_prefix_attention(q, k, v, visible, keys, values, passes, scale)
        return out.transpose(1, 2).flatten(2)


class DitOutput(nn.Module):
    def __init__(self, width: int, rows: int, condition: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width)
        self.linear = nn.Linear(width, rows)
        self.adaLN_modulation = nn.Linear(condition, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """What `linear` reads, (B, L, D)."""
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, -1)
        return modulate(self.norm_final(x), shift, scale)


class DitBackbone(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width, condition = config.hidden_dim, config.cond_dim
        self.vocab_embed = TokenTable(config.vocab_size, width)
        self.sigma_map = TimeMap(condition)
        self.blocks = nn.ModuleList(DitBlock(width, config.n_heads, condition) for _ in range(config.n_blocks))
        self.output_layer = DitOutput(width, config.vocab_size, condition)


class DitModel(PreTrainedModel):
    """A masked diffusion LM with the interface of `LladaModel`: `hidden` and `lm_head` are the two halves of `forward`.

    Its logits are the published ones, but for the mask, which is never predicted (`subs` of 2406.07524).
    """

    config_class = DitConfig
    lora_targets = r".*blocks\.\d+\.(attn_qkv|attn_out|mlp\.[02])"

    def __init__(self, config: DitConfig) -> None:
        super().__init__(config)
        self.backbone = DitBackbone(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Each layer has drawn its own."""

    @property
    def mask_id(self) -> int:
        return self.config.mask_token_id

    @property
    def embedding(self) -> Tensor:
        """(V, D)"""
        return self.backbone.vocab_embed.embedding

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)"""
        return self.backbone.vocab_embed(input_ids)

    def hidden(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        prefix: Prefix | None = None,
        response_mask: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D), (B, L) bool -> (B, L, D), what the output layer reads.

        response_mask: not used, as every position sees every other one. sigma (B,): the time, for networks that were trained
        with one; None is 0.
        """
        x, visible = inputs_embeds.to(self.embedding.dtype), padding_mask(attention_mask)
        sigma = torch.zeros(1, device=x.device) if sigma is None else sigma
        condition = F.silu(self.backbone.sigma_map(sigma))
        turn = self._turn(positions_from_mask(attention_mask), torch.promote_types(x.dtype, torch.float32))
        for number, block in enumerate(self.backbone.blocks):
            own = None if prefix is None else Prefix(*(part[number] for part in prefix))
            x = block(x, condition, turn, visible, own)
        return self.backbone.output_layer(x, condition)

    def _turn(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, 1, L, d) of the rotary angles (Su et al., 2104.09864)."""
        width = self.config.hidden_dim // self.config.n_heads
        # in float32 whatever the model's type, as the original keeps them
        rates = 1.0 / ROTARY_BASE ** (torch.arange(0, width, 2, device=positions.device).float() / width)
        angles = (positions.to(dtype).unsqueeze(-1) * rates).repeat(1, 1, 2).unsqueeze(1)
        return angles.cos(), angles.sin()

    def lm_head(self, states: Tensor) -> Tensor:
        """Logits (..., V) of `hidden` states (..., D).

        That of the mask is half of what its type can hold: its probability is 0, and a KL divergence stays finite.
        """
        logits = self.backbone.output_layer.linear(states)
        if self.config.mask_token_id is None:
            return logits
        never = torch.finfo(logits.dtype).min / 2
        return logits.index_fill(-1, torch.tensor([self.mask_id], device=logits.device), never)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        """(B, L) ids -> (B, L, V) logits of the clean token at every position."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        return self.lm_head(self.hidden(self.embed(input_ids), attention_mask, sigma=sigma))


def load_dit(path: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> DitModel:
    """An MDLM model from a folder or hub name of its published layout, or from what `save_pretrained` wrote.

    `dtype` "auto" keeps the type that the embedding table is stored in. Nothing in the folder is run or unpickled. A Lightning
    checkpoint becomes such a folder with `python -m models.backbones.dit_checkpoint`.
    Errors: UsageError for another architecture, fields that this body does not compute, and tensors that are missing,
    unexpected or of another shape; it names them.
    """
    device, wanted = files.parse_device(device), None if dtype == "auto" else files.parse_dtype(dtype)
    folder = files.find_folder(path)
    fields = files.read_json(folder / "config.json")
    if fields.get("model_type") != MDLM:
        raise UsageError(f"{folder} holds a {fields.get('model_type') or 'nameless'} model, not MDLM's")
    config = DitConfig(**config_from_mdlm(fields))
    with torch.device("meta"):
        model = DitModel(config)
    stored = without_frequencies(files.list_tensors(folder), config, str(folder))
    expected = files.expected_shapes(model, tied=False)
    names = files.match_names(expected, stored, lambda name: None, folder)
    files.fill_model(model, names, stored, wanted or stored[names["backbone.vocab_embed.embedding"]].dtype, device)
    return model.eval()


def without_frequencies(stored: dict, config: DitConfig, where: str) -> dict:
    """The tensors without the rotary frequencies, which follow from the number of heads.

    stored: name -> anything with a shape. Errors: UsageError where they are those of another number of heads.
    """
    wanted = (config.hidden_dim // config.n_heads // 2,)
    for name, tensor in stored.items():
        if name.endswith("rotary_emb.inv_freq") and tuple(tensor.shape) != wanted:
            raise UsageError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, and with {config.n_heads} heads of a width of "
                f"{config.hidden_dim} it would have {wanted}; correct n_heads"
            )
    return {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
