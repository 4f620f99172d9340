"""Tokens per second of the student against its teacher's sampler at several numbers of forward passes (NFE).

python benchmarks/decoding.py --forwards 1 8 32 --batch 1 32
python benchmarks/decoding.py --batch 1 --fill                the largest batch that fits a GPU, beside one text
python benchmarks/decoding.py --batch 1 --fill --memory 2     on a CPU: that takes at most 2 GiB
Legend: B batch, P prompt columns, R response columns, V vocabulary.
"""

import argparse

import torch
from full_batch import largest_batch
from shapes import FIRST_WORD_ID, add_shape_options, build_base
from timing import (
    Row,
    as_ratio,
    build_result,
    build_row,
    in_mebibytes,
    in_milliseconds,
    interleave,
    new_parser,
    peak_bytes,
    prepare,
    show,
    timed,
    write_json,
)
from torch import Generator, Tensor, nn

from models.backbones.llada import LladaModel
from models.diffusion.sampler import MaskedDiffusionDecoder
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.one_step import OneStepDecoder
from models.flow.prefix_student import PrefixStudent
from models.flow.solver import NoisyMaskDecoder
from models.interfaces.decoder import Decoder
from reporting.console import report_console

STUDENT = "student"

READING = """
tokens/s counts response tokens. A ratio is the time over the student's at the same batch, in the same round, median
[first, third quartile]: how many times faster the student is. If only forward passes cost time, it would be the ratio of
their numbers. It is smaller where the student's forward pass, with its soft prompt and gated attention, costs more than the
teacher's; the teacher at 1 forward pass shows that difference alone. Weights are random: speed does not depend on them, and
quality is not measured here.
"""


def build_decoders(base: LladaModel, args: argparse.Namespace, device: torch.device) -> dict[str, Decoder]:
    """The student and, on the same base, the teacher's sampler at every number of forward passes."""
    sizes, temperature = {"prompt_length": args.prefix, "hidden_size": args.prompt_width}, args.temperature
    kind = NoisyMaskStudent if args.flow == "noisy_mask" else PrefixStudent
    student = kind(base, **sizes).to(device)
    nn.init.constant_(student.soft_prompt.gate, 0.5)
    one = (
        NoisyMaskDecoder(student, 1) if args.flow == "noisy_mask" else OneStepDecoder(student, temperature=temperature)
    )
    decoders: dict[str, Decoder] = {STUDENT: one}
    for forwards in args.forwards:
        sampler = MaskedDiffusionDecoder(base, forwards, temperature=temperature, remasking=args.remasking)
        decoders[f"teacher, {forwards} forwards" if forwards > 1 else "teacher, 1 forward"] = sampler
    return decoders


def build_prompts(batch: int, args: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Random prompts in the first P columns of (B, P + R); the ids in the response columns are not read."""
    input_ids = torch.randint(FIRST_WORD_ID, args.vocabulary, (batch, args.prompt + args.response)).to(device)
    everywhere = torch.ones_like(input_ids, dtype=torch.bool)
    response = everywhere.clone()
    response[:, : args.prompt] = False
    return {"input_ids": input_ids, "attention_mask": everywhere, "response_mask": response}


def filling_batch(decoders: dict[str, Decoder], args: argparse.Namespace, device: torch.device) -> int:
    """The largest batch that every decoder has room for, see `largest_batch`."""
    limit = None if args.memory is None else args.memory * 2**30

    def peak_of(batch: int) -> int:
        rows = build_prompts(batch, args, device)
        generator = Generator(device=device).manual_seed(args.seed)
        return max(peak_bytes(lambda one=one: one(rows, generator), device) or 0 for one in decoders.values())

    return largest_batch(peak_of, limit)


def measure_batch(
    batch: int, decoders: dict[str, Decoder], args: argparse.Namespace, device: torch.device
) -> list[Row]:
    """A row for every decoder at one batch size."""
    rows = build_prompts(batch, args, device)
    runs = {
        name: lambda decoder=decoder: decoder(rows, Generator(device=device).manual_seed(args.seed))
        for name, decoder in decoders.items()
    }
    measures = {name: timed(run, device, args.clock) for name, run in runs.items()}
    times = interleave(measures, repeats=args.repeats, warmup=args.warmup)
    found = []
    for name, decoder in decoders.items():
        row = build_row(name, times, STUDENT, batch=batch, forwards=decoder.forwards)
        row["tokens_per_s"] = batch * args.response / row["seconds"]["median"]
        row["peak_bytes"] = peak_bytes(runs[name], device)
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=10)
    add_shape_options(parser)
    parser.add_argument("--flow", choices=("noisy_mask", "logit"), default="noisy_mask", help="of the student")
    parser.add_argument("--vocabulary", type=int, default=300)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="rows decoded together")
    parser.add_argument("--fill", action="store_true", help="also the largest batch, by doubling, that fits the device")
    parser.add_argument(
        "--memory", type=float, help="GiB that --fill may take beside the weights; on a GPU what is free"
    )
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens in a row")
    parser.add_argument("--response", type=int, default=64, help="response tokens in a row")
    parser.add_argument("--forwards", type=int, nargs="+", default=[1, 8, 32], help="of the teacher's sampler")
    parser.add_argument("--temperature", type=float, default=0.0, help="of both; 0 takes the most probable token")
    parser.add_argument("--remasking", choices=("random", "low_confidence"), default="low_confidence")
    parser.set_defaults(prefix=8)  # the default job's; module=logit_flow has 16
    args = parser.parse_args(argv)
    if max(args.forwards) > args.response:
        parser.error(f"--forwards {max(args.forwards)} exceeds the {args.response} tokens of --response")
    if args.fill and args.memory is None and args.device == "cpu":
        parser.error("--fill on a CPU needs --memory GIB: a CPU does not say when it is full")
    device, console = prepare(args), report_console()
    base = build_base(args, device, vocab_size=args.vocabulary, length=args.prompt + args.response)
    decoders = build_decoders(base, args, device)

    if args.fill:
        filling = filling_batch(decoders, args, device)
        if filling == 0:
            parser.error(f"--memory {args.memory}: not one row fits; type more GiB")
        args.batch = sorted({*args.batch, filling})
        console.print(f"largest batch that fits: {filling}", highlight=False)
    rows = [row for batch in args.batch for row in measure_batch(batch, decoders, args, device)]
    result = build_result("decoding", args, device, rows, READING)
    columns = {
        "decoder": lambda row: f"batch {row['batch']}: {row['name']}",
        "ms": in_milliseconds,
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "forwards": lambda row: str(row["forwards"]),
        "student faster by": as_ratio,
        "peak MiB": in_mebibytes,
    }
    show(result, columns, console)
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
