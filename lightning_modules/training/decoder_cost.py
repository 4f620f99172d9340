"""What a decoder's responses to a batch cost: wall-clock time, FLOPs and peak memory."""

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Generator, Tensor

from lightning_modules.training.flops import run_counted
from models.interfaces.decoder import Decoder, forward_passes_of

SINGLE_TEXTS = 3  # of a batch, generated alone after one that warms up


@dataclass(frozen=True)
class SingleText:
    """Medians over texts that were generated alone: seconds until a text, and its first token where they come one by one."""

    seconds: float
    first_token_seconds: float | None


@dataclass(frozen=True)
class DecoderResult:
    """responses (B, R); seconds of wall-clock time; FLOPs per response token and peak bytes, None where not measured.

    single: the same texts at batch 1, None where not measured.
    forward_passes (B,): of each text.
    batch_passes: of the whole batch; None where its text with the most decides.
    """

    decoder: Decoder
    responses: Tensor
    seconds: float
    flops_per_token: float | None
    peak_memory_bytes: int | None
    forward_passes: Tensor
    single: SingleText | None = None
    batch_passes: int | None = None


def measure_decoder(
    decoder: Decoder, batch: dict[str, Tensor], generator: Generator, *, in_detail: bool
) -> DecoderResult:
    """Run the decoder once on the batch.

    in_detail: its FLOPs are counted in another run on two rows, and some rows are generated alone.
    """
    device = batch["input_ids"].device
    on_gpu = device.type == "cuda"
    synchronise(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    responses = decoder(batch, generator)
    synchronise(device)
    seconds = time.perf_counter() - start
    passes, batch_passes = forward_passes_of(decoder, len(responses)), getattr(decoder, "batch_passes", None)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    in_detail = in_detail and decoder.forwards > 0
    flops = flops_per_token(decoder, batch) if in_detail else None
    single = single_text(decoder, batch) if in_detail else None
    return DecoderResult(decoder, responses, seconds, flops, peak, passes, single, batch_passes)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def single_text(decoder: Decoder, batch: dict[str, Tensor]) -> SingleText:
    """What a text costs at batch 1. However few rows there are, every rank generates as often: split layers are gathered."""
    device, rows = batch["input_ids"].device, len(batch["input_ids"])
    generator = Generator(device=device).manual_seed(0)
    streams = not getattr(decoder, "refines", True)
    seconds, first = [], []
    for k in [0, *(n % rows for n in range(SINGLE_TEXTS))]:
        row = {name: column[k : k + 1] for name, column in batch.items()}
        arrived: list[float] = []

        def note_time(_: Tensor, arrived: list[float] = arrived) -> None:
            if not arrived:
                synchronise(device)
                arrived.append(time.perf_counter())

        synchronise(device)
        start = time.perf_counter()
        if streams:
            decoder(row, generator, note_time)
        else:
            decoder(row, generator)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
        first += [at - start for at in arrived]
    return SingleText(median(seconds[1:]), median(first[1:]) if streams else None)


def flops_per_token(decoder: Decoder, batch: dict[str, Tensor]) -> float:
    """FLOPs of two rows of the batch, per response token."""
    few = {name: column[:2] for name, column in batch.items()}
    generator = Generator(device=batch["input_ids"].device).manual_seed(0)
    responses, flops = run_counted(lambda: decoder(few, generator))
    return flops / responses.numel()
