"""What reading packed rows costs: the loader against slicing a memory-mapped array by hand, and against a training step.

python benchmarks/packed_loader.py --length 1024 --batch 32
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from timing import (
    Row,
    build_result,
    build_row,
    in_milliseconds,
    interleave,
    new_parser,
    prepare,
    quartiles,
    show,
    timed,
    write_json,
)

from datamodules.packed_text import PackedTextDataModule
from models.backbones.causal import build_causal
from models.objectives.next_token import NextToken
from reporting.console import report_console

HAND = "sliced by hand"
LOADER = "loader"
MASKED = "loader, document_mask"
WORKER = "loader, one worker"
STEP = "training step"

READING = """
each row reads the same number of batches in a random order of rows. By hand: for every row a slice of the memory-mapped
tokens for the input and one for the targets, made int64 and stacked, nothing else. The loader gives these and the bytes that
each target stands for, from the same file; document_mask adds document and position ids. Tokens per second are those of the
inputs; a ratio is the loader's rate over that by hand in the same round (above 1 is faster), median [first, third quartile].
That the rows are the same is checked. The training step is the forward, backward and AdamW of a causal body of 2 million
parameters (experiment=next_token_text), timed on two rows and multiplied: its tokens per second are what a loader must deliver.
"""


def sliced_by_hand(
    path: Path, kind: str, length: int, batch: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (input, targets) of a file of tokens, as a short training script makes them."""
    data = np.memmap(path, kind, mode="r").view(np.ndarray)  # slices of np.memmap itself cost several times as much
    order = np.random.default_rng(seed)
    while True:
        starts = length * order.integers((len(data) - 1) // length, size=batch)
        inputs = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
        yield inputs, targets


def endless(loader) -> Iterator[dict[str, torch.Tensor]]:
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def some_text(path: Path, documents: int, seed: int) -> None:
    """Documents of 20 to 400 words, one a line."""
    draw = np.random.default_rng(seed)
    words = ["".join(map(chr, draw.integers(97, 123, size=size))) for size in draw.integers(1, 12, size=2000)]
    with open(path, "w") as file:
        for size in draw.integers(20, 400, size=documents):
            file.write(" ".join(words[k] for k in draw.integers(2000, size=size)) + "\n")


def check_rows(data: PackedTextDataModule) -> None:
    """The loader's first rows, unshuffled, are slices of the file."""
    rows, stream = data.rows["train"], data.rows["train"].stream
    tokens = np.memmap(stream.cache.folder / "tokens.bin", stream.cache.about["id_type"], mode="r")
    batch = rows.__getitems__([0, 1, 2])
    for row in range(3):
        piece = tokens[row * data.sequence_length : (row + 1) * data.sequence_length + 1].astype(np.int64)
        if not np.array_equal(batch["input_ids"][row], piece[:-1]) or not np.array_equal(
            batch["labels"][row], piece[1:]
        ):
            raise SystemExit(f"row {row} of the loader is not the slice by hand")


def training_step(batch: dict[str, torch.Tensor], vocab_size: int, device: torch.device) -> Callable[[], None]:
    """A step of next-token prediction on a batch."""
    body = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 512}
    most = batch["input_ids"].shape[1]
    model = build_causal(vocab_size=vocab_size, max_position_embeddings=most, rope_theta=10_000.0, **body).to(device)
    optimizer, objective = torch.optim.AdamW(model.parameters()), NextToken()
    batch = {name: column.to(device) for name, column in batch.items()}

    def step() -> None:
        out = objective(model, batch, torch.Generator())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_all(args: argparse.Namespace, device: torch.device, folder: Path) -> list[Row]:
    some_text(folder / "train.txt", args.documents, args.seed)
    some_text(folder / "val.txt", 20, args.seed + 1)

    def data(**options) -> PackedTextDataModule:
        made = PackedTextDataModule(
            name="benchmark", train=folder / "train.txt", val=folder / "val.txt", test=folder / "val.txt", cut="line",
            tokenizer="bpe", vocab_size=1024, tokenizer_megabytes=1, sequence_length=args.length, batch_size=args.batch,
            eval_batch_size=args.batch, cache_dir=folder, seed=args.seed, **options,
        )  # fmt: skip
        made.setup()
        return made

    plain = data()
    check_rows(plain)
    cache = plain.rows["train"].stream.cache
    sources = {
        HAND: sliced_by_hand(cache.folder / "tokens.bin", cache.about["id_type"], args.length, args.batch, args.seed),
        LOADER: endless(plain.train_dataloader()),
        MASKED: endless(data(document_mask=True).train_dataloader()),
        WORKER: endless(data(num_workers=1).train_dataloader()),
    }

    def take(source: Iterator) -> Callable[[], None]:
        return lambda: [next(source) for _ in range(args.batches)] and None

    few = plain.rows["train"].__getitems__(list(range(min(2, args.batch))))
    measures = {name: timed(take(source), device, args.clock) for name, source in sources.items()}
    step, shares = (
        timed(training_step(few, len(plain.tokenizer), device), device, args.clock),
        args.batch / len(few["labels"]),
    )
    measures[STEP] = lambda: args.batches * shares * step()
    times = interleave(measures, repeats=args.repeats, warmup=args.warmup)
    tokens, rows = args.batches * args.batch * args.length, []
    for name in measures:
        rates = [theirs / ours for ours, theirs in zip(times[name], times[HAND], strict=True)]
        speed = {"tokens_per_s": tokens / quartiles(times[name])["median"], "rate": quartiles(rates)}
        rows.append(build_row(name, times, HAND, **speed))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=40)
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=32, help="rows")
    parser.add_argument("--batches", type=int, default=50, help="read in a round")
    parser.add_argument("--documents", type=int, default=20_000, help="of about 200 words, in the corpus that is made")
    args = parser.parse_args(argv)
    device, console = prepare(args), report_console()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(args, device, Path(folder))
    result = build_result("packed_loader", args, device, rows, READING)
    columns = {
        "rows": lambda row: row["name"],
        f"ms for {args.batches} batches": in_milliseconds,
        "million tokens/s": lambda row: f"{row['tokens_per_s'] / 1e6:.3g}",
        "rate, ratio": lambda row: "{median:.3g} [{q1:.3g}, {q3:.3g}]".format(**row["rate"]),
    }
    show(result, columns, console)
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
