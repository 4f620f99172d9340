"""How much memory a LLaDA model needs, stated and checked before a byte of it is read.

Legend: B batch, L length, N layers, D width, F feed-forward width, H heads, K prefix length, V vocabulary, b bytes per
number.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from models.backbones.checkpoint_files import find_folder, local_folder, parse_device, parse_dtype
from models.backbones.llada import LladaConfig, LladaModel, load_llada, read_config
from models.functional.errors import UsageError

try:
    import psutil
except ImportError:
    psutil = None

Purpose = Literal["inference", "distillation"]
GIB = 2**30


@dataclass(frozen=True)
class Footprint:
    """Parameters, and bytes for the weights alone, for one forward pass and for one distillation step."""

    parameters: int
    dtype: torch.dtype
    batch_size: int
    length: int
    weights: int
    inference: int
    distillation: int

    def __str__(self) -> str:
        rows = {
            "weights": self.weights,
            "one forward pass": self.inference,
            "one distillation step": self.distillation,
        }
        lines = [f"  {what:<22}{_gib(size):>10}" for what, size in rows.items()]
        kind, batch = str(self.dtype).removeprefix("torch."), f"batch {self.batch_size}, length {self.length}"
        return "\n".join([f"LLaDA, {self.parameters:,} parameters in {kind}; {batch}", *lines])


def describe_footprint(
    config: LladaConfig, dtype: torch.dtype | str, *, batch_size: int = 1, length: int = 512, prompt_length: int = 16
) -> Footprint:
    r"""Count the parameters without making them, and estimate in bytes what a run with them needs.

    .. math::
        \text{inference} &= \text{weights} + B L\,[(4 D + 3 F)\, b + 8 V] \\
        \text{distillation} &= \text{weights} + 1.3\, B L N\,[8 D + (4 D + 3 F + 2 H (L + K))\, b] + 36\, B L V

    Inference: one layer's intermediate results, logits and a float32 softmax of them at every position. Distillation:
    a frozen base and what its layers keep for the prefix' gradient (per token and layer two float32 norms, q, k, v, the
    attention output, three feed-forward results, two rows of attention weights), times 1.3 because `forward_ad` carries
    the tangents along (1.1 with `finite_difference`), and nine float32 arrays of logits with every position
    masked. The constants were fitted to torch's allocator on small models in float32. Not counted: the trainable part,
    16 bytes per parameter with AdamW.
    Errors: UsageError for an unknown dtype.
    """
    dtype = parse_dtype(dtype)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in LladaModel(config).parameters())
    b, tokens = dtype.itemsize, batch_size * length
    width, ffn, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    dense = (4 * width + 3 * ffn) * b
    kept = 8 * width + dense + 2 * heads * (length + prompt_length) * b
    weights = parameters * b
    return Footprint(
        parameters=parameters,
        dtype=dtype,
        batch_size=batch_size,
        length=length,
        weights=weights,
        inference=weights + tokens * (dense + 8 * config.vocab_size),
        distillation=weights + int(1.3 * tokens * config.num_hidden_layers * kept) + 36 * tokens * config.vocab_size,
    )


def available_memory(device: torch.device | str) -> int:
    """Bytes that can still be taken on `device`. On a CPU the whole machine's: the limit of a container is not seen."""
    device = parse_device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if psutil is not None:
        return psutil.virtual_memory().available
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_memory(footprint: Footprint, device: torch.device | str, purpose: Purpose = "inference") -> None:
    """Errors: UsageError where `device` has less memory left than `purpose` needs."""
    if purpose not in ("inference", "distillation"):
        raise UsageError(f"model.purpose={purpose} is not known; type inference or distillation")
    needed, available = getattr(footprint, purpose), available_memory(device)
    if needed > available:
        raise UsageError(
            f"{purpose} with this model needs about {_gib(needed)} on {device} ({_gib(footprint.weights)} of weights; "
            f"batch {footprint.batch_size}, length {footprint.length}), and {_gib(available)} are free. Type a smaller "
            f"model, such as model.path=FOLDER, or use a machine with at least {-(-needed // GIB)} GiB free"
        )


def load_llada_checked(
    path: str | Path,
    *,
    shape: Mapping[str, Any],
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str = "cpu",
    purpose: Purpose = "inference",
    batch_size: int = 1,
    length: int = 512,
) -> LladaModel:
    """Print the footprint, require that much memory on `device`, and only then `load_llada`.

    A local folder's config.json says how large it is; for a hub name `shape` (arguments of `LladaConfig`) does, so that
    nothing is downloaded in vain, and the downloaded config.json decides.
    Errors: UsageError of `require_memory` and `load_llada`.
    """
    folder, footprint = local_folder(path), None
    if folder is None:
        footprint = describe_footprint(LladaConfig(**shape), dtype, batch_size=batch_size, length=length)
        print(footprint, flush=True)
        require_memory(footprint, device, purpose)
        folder = find_folder(path)
    found = describe_footprint(read_config(folder), dtype, batch_size=batch_size, length=length)
    if found != footprint:
        print(found, flush=True)
        require_memory(found, device, purpose)
    return load_llada(folder, dtype=dtype, device=device)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
