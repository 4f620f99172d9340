"""What a decoder's responses to a batch cost: wall-clock time, FLOPs and peak memory."""

import time
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lightning_modules.training.flops import run_counted
from models.interfaces.decoder import Decoder


@dataclass(frozen=True)
class DecoderResult:
    """responses (B, R); seconds of wall-clock time; FLOPs per response token and peak bytes, None where not measured.

    forward_passes (B,): of each text, for a decoder whose number follows the model; None where it is `decoder.forwards`.
    """

    decoder: Decoder
    responses: Tensor
    seconds: float
    flops_per_token: float | None
    peak_memory_bytes: int | None
    forward_passes: Tensor | None = None


def measure_decoder(
    decoder: Decoder, batch: dict[str, Tensor], generator: Generator, *, count_flops: bool
) -> DecoderResult:
    """Run the decoder once on the batch; its FLOPs are counted in a second run on two rows."""
    device = batch["input_ids"].device
    on_gpu = device.type == "cuda"
    synchronise(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    responses = decoder(batch, generator)
    synchronise(device)
    seconds = time.perf_counter() - start
    passes = getattr(decoder, "forward_passes", None)
    flops = flops_per_token(decoder, batch) if count_flops and decoder.forwards else None
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return DecoderResult(decoder, responses, seconds, flops, peak, passes)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_per_token(decoder: Decoder, batch: dict[str, Tensor]) -> float:
    """FLOPs of two rows of the batch, per response token."""
    few = {name: column[:2] for name, column in batch.items()}
    generator = Generator(device=batch["input_ids"].device).manual_seed(0)
    responses, flops = run_counted(lambda: decoder(few, generator))
    return flops / responses.numel()
