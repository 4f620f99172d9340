"""A checkpoint of MDLM's or Duo's layout of a few weights, and a forward written from the published names alone."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

# of the published config.json, smaller; bytes, the end and the mask of `gpt2_bytes`
CONFIG = {
    "_name_or_path": "kuleshov-group/mdlm-owt",
    "architectures": ["MDLM"],
    "auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig", "AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
    "cond_dim": 6,
    "dropout": 0.1,
    "hidden_dim": 24,
    "mask_token_id": 257,
    "model_length": 32,
    "model_type": "mdlm",
    "n_blocks": 3,
    "n_heads": 4,
    "return_dict": False,
    "time_conditioning": False,
    "torch_dtype": "float32",
    "transformers_version": "4.38.2",
    "vocab_size": 258,
}
# of MDLM's code, and of Duo's, whose options of the method are under algo
SIZES = {"name": "small", "type": "ddit", "hidden_size": 24, "cond_dim": 6, "length": 32, "n_blocks": 3, "n_heads": 4}
OF_MDLM = {
    "mode": "train", "diffusion": "absorbing_state", "backbone": "dit", "parameterization": "subs",
    "time_conditioning": False, "T": 0, "model": SIZES,
}  # fmt: skip
OF_DUO = {
    "mode": "train", "model": SIZES,
    "algo": {
        "name": "mdlm", "backbone": "dit", "parameterization": "subs", "time_conditioning": False, "causal_attention": False,
    },
}  # fmt: skip


def make_weights(config: dict = CONFIG) -> dict[str, torch.Tensor]:
    """Random tensors under the published names, in the order of the parameters; the norms and gates are far from trivial."""
    generator = torch.Generator().manual_seed(0)
    width, cond, rows = config["hidden_dim"], config["cond_dim"], config["vocab_size"]
    shapes = {"vocab_embed.embedding": (rows, width)}
    for name, inner in (("sigma_map.mlp.0", 256), ("sigma_map.mlp.2", cond)):
        shapes |= {f"{name}.weight": (cond, inner), f"{name}.bias": (cond,)}
    shapes["rotary_emb.inv_freq"] = (width // config["n_heads"] // 2,)
    for i in range(config["n_blocks"]):
        block = f"blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (width,), f"{block}.attn_qkv.weight": (3 * width, width)}
        shapes |= {f"{block}.attn_out.weight": (width, width), f"{block}.norm2.weight": (width,)}
        shapes |= {f"{block}.mlp.0.weight": (4 * width, width), f"{block}.mlp.0.bias": (4 * width,)}
        shapes |= {f"{block}.mlp.2.weight": (width, 4 * width), f"{block}.mlp.2.bias": (width,)}
        shapes |= {
            f"{block}.adaLN_modulation.weight": (6 * width, cond),
            f"{block}.adaLN_modulation.bias": (6 * width,),
        }
    shapes |= {"output_layer.norm_final.weight": (width,)}
    shapes |= {"output_layer.linear.weight": (rows, width), "output_layer.linear.bias": (rows,)}
    shapes |= {"output_layer.adaLN_modulation.weight": (2 * width, cond)}
    shapes |= {"output_layer.adaLN_modulation.bias": (2 * width,)}
    weights = {
        f"backbone.{name}": torch.randn(shape, generator=generator) / (math.sqrt(shape[-1]) if shape[1:] else 1)
        for name, shape in shapes.items()
    }
    width_of_head = width // config["n_heads"]
    weights["backbone.rotary_emb.inv_freq"] = 1.0 / 10_000 ** (torch.arange(0, width_of_head, 2) / width_of_head)
    return weights


def reference_logits(
    config: dict, weights: dict[str, torch.Tensor], ids: torch.Tensor, sigma: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, L, V) in float64: what the published network gives before `subs`. sigma (B,): 0 unless given."""
    w = {name.removeprefix("backbone."): weight.double() for name, weight in weights.items()}
    width, heads = config["hidden_dim"], config["n_heads"]
    sigma = torch.zeros(len(ids)) if sigma is None else sigma
    frequency = torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)
    times = torch.cat([(sigma[:, None] * frequency).cos(), (sigma[:, None] * frequency).sin()], -1)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def rotate(x):  # (B, L, H, d)
        angle = torch.arange(x.shape[1]).double()[:, None] * w["rotary_emb.inv_freq"]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        one, two = x.chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    c = F.silu(linear(F.silu(linear(times, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
    x = w["vocab_embed.embedding"][ids]
    for i in range(config["n_blocks"]):
        block = f"blocks.{i}"
        parts = linear(c, f"{block}.adaLN_modulation").view(len(c), 1, 6, width).unbind(2)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        qkv = linear(norm(x, f"{block}.norm1") * (1 + scale) + shift, f"{block}.attn_qkv")
        q, k, v = qkv.view(*ids.shape, 3, heads, width // heads).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k)) / math.sqrt(width // heads)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(*ids.shape, width)
        x = x + gate * linear(out, f"{block}.attn_out")
        y = norm(x, f"{block}.norm2") * (1 + scale_mlp) + shift_mlp
        x = x + gate_mlp * linear(F.gelu(linear(y, f"{block}.mlp.0"), approximate="tanh"), f"{block}.mlp.2")
    shift, scale = linear(c, "output_layer.adaLN_modulation").view(len(c), 1, 2, width).unbind(2)
    return linear(norm(x, "output_layer.norm_final") * (1 + scale) + shift, "output_layer.linear")


def reference_subs(logits: torch.Tensor, ids: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Log-probabilities (B, L, V) of MDLM's parametrisation: no mask is predicted, and a token that is there stays."""
    logits = logits.clone()
    logits[..., mask_id] -= 1e6
    found = logits.log_softmax(-1)
    kept = torch.full_like(found, -1e6).scatter(-1, ids.unsqueeze(-1), 0.0)
    return torch.where((ids == mask_id).unsqueeze(-1), found, kept)


def write_mdlm(folder: Path, config: dict = CONFIG, weights: dict | None = None) -> Path:
    """A folder as it is published: without a tokenizer, and its code is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(make_weights(config) if weights is None else weights, folder / "model.safetensors")
    return folder


def write_checkpoint(path: Path, training: dict = OF_MDLM, *, averages: bool = True, more: dict | None = None) -> Path:
    """A Lightning checkpoint of plain values, as its code writes it; averages are the weights plus one."""
    weights = make_weights()
    found = {"state_dict": weights, "hyper_parameters": {"config": training}, "epoch": 1, "loops": {}}
    if averages:
        shadow = [weight + 1 for name, weight in weights.items() if not name.endswith("inv_freq")]
        found["ema"] = {"decay": 0.9999, "num_updates": 5, "shadow_params": shadow}
    torch.save(found | (more or {}), path)
    return path
