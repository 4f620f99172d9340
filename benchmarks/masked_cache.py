"""Filling masks block by block with keys and values of earlier passes (module.cache) against reading everything.

python benchmarks/masked_cache.py --threads 1
Legend: B batch, P prompt columns, R response columns, L = P + R, V vocabulary.
"""

import argparse

import torch
from shapes import FIRST_WORD_ID, add_shape_options, build_base
from timing import (
    Row,
    as_ratio,
    build_result,
    build_row,
    in_milliseconds,
    interleave,
    new_parser,
    prepare,
    show,
    timed,
    write_json,
)
from torch import Generator, Tensor

from lightning_modules.training.decoder_cost import flops_per_token
from models.backbones.llada import LladaModel
from models.diffusion.objective import MaskedDiffusion
from models.diffusion.sampler import MaskedDiffusionDecoder
from models.interfaces.masked_sampling import CacheKind, ReusedColumns
from reporting.console import report_console

NONE: CacheKind = "none"
KINDS: tuple[CacheKind, ...] = (NONE, "prefix", "dual")

READING = """
All rows take the same number of forward passes; a pass of a cache reads fewer columns. A ratio is the time over that without a
cache in the same round, median [first, third quartile]: 0.5 is twice as fast. FLOPs are those of a response token over those
without a cache. Same tokens: the share of response positions with the token that is chosen without a cache, at temperature 0.
Valid: the share of neighbouring tokens that follow the rule of the texts, on which the network was trained for --steps steps.
"""


def chain_texts(rows: int, args: argparse.Namespace, generator: Generator) -> Tensor:
    """Texts (rows, L) in which each word follows from the one before it, but for one in twenty, which is any word."""
    words = args.vocabulary - FIRST_WORD_ID
    anything = torch.randint(words, (rows, args.prompt + args.response), generator=generator)
    surprises = torch.rand(anything.shape, generator=generator) < 0.05
    text = anything.clone()
    for column in range(1, text.shape[1]):
        text[:, column] = torch.where(surprises[:, column], text[:, column], after(text[:, column - 1], words))
    return text + FIRST_WORD_ID


def after(word: Tensor, words: int) -> Tensor:
    return (3 * word + 1) % words


def rows_of(texts: Tensor, prompt: int) -> dict[str, Tensor]:
    response = torch.arange(texts.shape[1], device=texts.device).expand_as(texts) >= prompt
    return {"input_ids": texts, "attention_mask": torch.ones_like(response), "response_mask": response}


def train(base: LladaModel, args: argparse.Namespace, device: torch.device) -> None:
    """Masked diffusion on chains, so that the tokens that are compared are those of a network that knows its texts."""
    base.train()
    objective, generator = MaskedDiffusion(), Generator().manual_seed(args.seed)
    draws = Generator(device=device).manual_seed(args.seed)
    optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3)
    for _ in range(args.steps):
        batch = rows_of(chain_texts(args.train_batch, args, generator).to(device), args.prompt)
        optimizer.zero_grad()
        objective(base, batch, draws).loss.backward()
        optimizer.step()
    base.eval()


def share_valid(responses: Tensor, args: argparse.Namespace) -> float:
    words = responses - FIRST_WORD_ID
    return (words[:, 1:] == after(words[:, :-1], args.vocabulary - FIRST_WORD_ID)).double().mean().item()


def measure(base: LladaModel, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """A row for every cache, all on the same prompts."""
    rows = rows_of(chain_texts(args.batch, args, Generator().manual_seed(args.seed + 1)).to(device), args.prompt)
    decoders = {
        kind: MaskedDiffusionDecoder(
            base,
            args.forwards or args.response,
            temperature=0.0,
            remasking="low_confidence",
            block_length=args.block,
            reused=ReusedColumns(kind, None if kind == NONE else args.refresh),
        )
        for kind in KINDS
    }

    texts: dict[str, Tensor] = {}

    def decode(kind: CacheKind) -> None:
        texts[kind] = decoders[kind](rows, Generator(device=device).manual_seed(args.seed))

    measures = {kind: timed(lambda kind=kind: decode(kind), device, args.clock) for kind in decoders}
    times = interleave(measures, repeats=args.repeats, warmup=args.warmup)
    flops = {kind: flops_per_token(decoder, rows) for kind, decoder in decoders.items()}
    found = []
    for kind, decoder in decoders.items():
        row = build_row(kind, times, NONE, forwards=decoder.forwards)
        row["flops"] = flops[kind] / flops[NONE]
        row["same_tokens"] = (texts[kind] == texts[NONE]).double().mean().item()
        row["valid"] = share_valid(texts[kind], args)
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=3)
    add_shape_options(parser)
    parser.add_argument("--vocabulary", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="rows decoded together")
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens in a row")
    parser.add_argument("--response", type=int, default=256, help="response tokens in a row")
    parser.add_argument("--block", type=int, default=32, help="response tokens of a block")
    parser.add_argument("--forwards", type=int, default=None, help="forward passes of a text; one a token if not given")
    parser.add_argument("--refresh", type=int, default=None, help="passes from one that reads everything to the next")
    parser.add_argument("--steps", type=int, default=300, help="of the training before")
    parser.add_argument("--train-batch", type=int, default=8, help="rows of a training step")
    args = parser.parse_args(argv)
    device, console = prepare(args), report_console()
    base = build_base(args, device, vocab_size=args.vocabulary, length=args.prompt + args.response)
    train(base, args, device)

    result = build_result("masked_cache", args, device, measure(base, args, device), READING)
    columns = {
        "cache": lambda row: row["name"],
        "ms": in_milliseconds,
        "time ratio": as_ratio,
        "FLOPs": lambda row: f"{row['flops']:.3f}",
        "forwards": lambda row: str(row["forwards"]),
        "same tokens": lambda row: f"{row['same_tokens']:.3f}",
        "valid": lambda row: f"{row['valid']:.3f}",
    }
    show(result, columns, console)
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
