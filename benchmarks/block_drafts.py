"""Time of a generated token with drafts and without: of one causal model or of q* of two, beside transformers' own drafts.

python benchmarks/block_drafts.py --drafter RUN/drafter --options experiment=block_draft_oracle
Legend: B rows of a batch, P prompt columns.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from configured import configured
from timing import Row, Stopwatch, as_ratio, build_result, new_parser, prepare, quartiles, show, with_spread, write_json
from torch import Generator, Tensor, nn
from transformers import GenerationConfig

from app.build import build
from models.backbones.causal_lm import load_trained
from models.functional.next_token import read_columns, until_end
from models.functional.rows import prompted_rows, response_columns
from models.functional.vocabulary import vocabulary_size
from models.speculative.decoder import QStarDecoder
from models.speculative.distribution import MixtureDist
from models.speculative.draft_totals import DraftTotals
from models.speculative.drafter_files import load_drafter
from models.speculative.options import DecodingOptions, Scheme
from reporting.console import report_console

NAIVE = "no drafts"
Rows = dict[str, Tensor]

READING = """
Seconds of a batch over the tokens that it generates, up to the ends of its texts. A round decodes the same prompts in every
way, forwards in one round and backwards in the next; a ratio is to no drafts within the round, median [first, third quartile].
ratio: of the clock that is named above; CPU: of processor time of this process. tokens/forward: for each forward pass of a
verifier over a row, the prompt's and the token after a draft counted. accepted: tokens of a draft, the token after it not
counted. auto: the length of the highest expected speed-up at measured costs. Greedy texts of one model are the same in every
way up to rounding. Rows of transformers are of one model alone. All ways sample at the module's temperature, top-k and top-p.
"""


class Texts(NamedTuple):
    """tokens: generated. totals: of drafts; None where they are not known."""

    tokens: int
    totals: DraftTotals | None = None


class Trial(NamedTuple):
    """One run of one way of decoding."""

    wall: float
    cpu: float
    texts: Texts


Way = Callable[[Rows, int], Texts]  # (prompts of a batch, seed) -> its texts


def built(options: list[str], folder: Path) -> tuple[Any, Any]:
    """The module with its models and the data of an experiment, as mode=test has them."""
    module, _, data = build(configured(["mode=test", *options], folder))
    data.setup()
    return module.eval(), data


def prompts_at(data: Any, chosen: list[int]) -> Rows:
    """Prompts with room for their responses; of a row of text the first half is the prompt."""
    return prompted_rows(data.rows["test"].__getitems__(chosen))


def target_of(module: Any, greedy: bool) -> MixtureDist:
    """The module's target; its most probable tokens where greedy."""
    return replace(module.mixture, temperature=1.0, top_k=1, top_p=None) if greedy else module.mixture


def our_ways(module: Any, data: Any, drafter: nn.Module | None, args: argparse.Namespace) -> dict[str, Way]:
    alone = module.theta is module.target
    mixture = target_of(module, args.greedy)

    room = response_columns(prompts_at(data, [0])["response_mask"])

    def way(scheme: Scheme, gamma: Any) -> Way:
        decoder = QStarDecoder(
            module.theta, module.target, scheme, DecodingOptions(mixture, gamma, costs="measured"),
            response_length=room, vocab_size=vocabulary_size(data.tokenizer), end_ids=data.end_ids(),
            assistant=drafter,
        )  # fmt: skip

        def run(rows: Rows, seed: int) -> Texts:
            decoder.outputs.clear()
            decoder(rows, Generator(rows["input_ids"].device).manual_seed(seed))
            out = decoder.outputs[0]
            return Texts(int(out.lengths.sum()), None if scheme in ("theta", "alternate") else out.totals)

        return run

    ways = {NAIVE: way("naive", 0), "n-grams, auto": way("ngram", "auto"), "n-grams of 4": way("ngram", 4)}
    if not alone:
        ways |= {"π_θ drafts, auto": way("theta", "auto"), "alternating, auto": way("alternate", "auto")}
    if drafter is not None:
        length = int(drafter.block_length)  # type: ignore[arg-type]
        ways |= {f"blocks of {length}": way("block_drafter", length), "blocks, auto": way("block_drafter", "auto")}
    return ways


def ways_of_transformers(module: Any, data: Any, batch: int, args: argparse.Namespace) -> dict[str, Way]:
    """Of one model; its drafts are for one text at a time. They sample as the module does, whatever the model's folder says."""
    target = target_of(module, args.greedy)
    sampling: dict[str, Any] = {"do_sample": False}
    if not args.greedy:
        cut = {"top_k": target.top_k or 0, "top_p": target.top_p or 1.0}
        sampling = {"do_sample": True, "temperature": target.temperature, **cut}
    # what a call leaves out is taken from here
    module.theta.generation_config = GenerationConfig()
    model, ends = module.theta, tuple(torch.as_tensor(data.end_ids()).flatten().tolist())

    def way(**more: Any) -> Way:
        def run(rows: Rows, seed: int) -> Texts:
            torch.manual_seed(seed)
            columns = response_columns(rows["response_mask"])
            seen = read_columns(rows)[:, :-columns]
            used = seen.any(0)
            ids = rows["input_ids"][:, :-columns][:, used]
            texts = model.generate(
                ids, attention_mask=seen[:, used].long(), max_new_tokens=columns, eos_token_id=list(ends) or None,
                pad_token_id=ends[0] if ends else 0, use_cache=True, **sampling, **more,
            )  # fmt: skip
            return Texts(int(until_end(texts[:, ids.shape[1] :], ends).sum()))

        return run

    ways = {"transformers, no drafts": way()}
    if batch == 1:
        ways["transformers, prompt lookup"] = way(prompt_lookup_num_tokens=args.lookup)
        if args.assistant is not None:
            ways["transformers, assisted"] = way(assistant_model=load_trained(args.assistant, "--assistant"))
    return ways


def measure(ways: dict[str, Way], data: Any, batch: int, rounds: int, args: argparse.Namespace) -> list[Row]:
    """A row of the table for each way."""
    trials: dict[str, list[Trial]] = {name: [] for name in ways}
    for turn in range(args.warmup + rounds):
        chosen = [(turn * batch + k) % len(data.rows["test"]) for k in range(batch)]
        prompts = {name: column.to(args.device) for name, column in prompts_at(data, chosen).items()}
        names = list(ways) if turn % 2 else list(ways)[::-1]
        for name in names:
            trial = timed_once(ways[name], prompts, args.seed + turn, torch.device(args.device))
            if turn >= args.warmup:
                trials[name].append(trial)
    base = trials[NAIVE]
    return [row_of(name, batch, found, base, args.clock) for name, found in trials.items()]


def timed_once(way: Way, prompts: Rows, seed: int, device: torch.device) -> Trial:
    wall, cpu = (Stopwatch(device, clock) for clock in ("wall", "cpu"))
    texts = way(prompts, seed)
    return Trial(wall.seconds(), cpu.seconds(), texts)


def row_of(name: str, batch: int, trials: list[Trial], base: list[Trial], clock: str) -> Row:
    ratios = {
        kind: [
            (getattr(ours, kind) / ours.texts.tokens) / (getattr(plain, kind) / plain.texts.tokens)
            for ours, plain in zip(trials, base, strict=True)
        ]
        for kind in ("wall", "cpu")
    }
    row: Row = {
        "name": name,
        "batch": batch,
        "seconds": quartiles([getattr(trial, clock) / trial.texts.tokens for trial in trials]),
        "ratio": quartiles(ratios[clock]),
        "wall_ratio": quartiles(ratios["wall"]),
        "cpu_ratio": quartiles(ratios["cpu"]),
        "tokens": sum(trial.texts.tokens for trial in trials),
    }
    row["speedup"] = 1 / row["ratio"]["median"]
    known = [trial.texts.totals for trial in trials if trial.texts.totals is not None]
    if known:
        totals = sum(known, DraftTotals())
        row |= {"tokens_per_forward": totals.tokens_per_forward, "accepted_length": totals.accepted_length}
    return row


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=12)
    parser.add_argument(
        "--options", nargs="+", required=True, help="experiment=... and what else names models and data"
    )
    parser.add_argument("--drafter", type=Path, default=None, help="folder of a block drafter for these models")
    parser.add_argument(
        "--assistant", type=Path, default=None, help="a small model for transformers' assisted generation"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, nargs="+", default=None, help="by batch; --repeats unless given")
    parser.add_argument("--greedy", action="store_true", help="the most probable tokens instead of samples")
    parser.add_argument("--lookup", type=int, default=10, help="tokens that transformers' prompt lookup proposes")
    args = parser.parse_args(argv)
    device, console = prepare(args), report_console()
    rounds = args.rounds or [args.repeats] * len(args.batch)
    if len(rounds) != len(args.batch):
        raise SystemExit("--rounds needs a number for each of --batch")
    with tempfile.TemporaryDirectory() as folder:
        module, data = built(args.options, Path(folder))
    module.to(device)
    drafter = None
    if args.drafter is not None:
        verifiers = {"theta": module.theta} | ({} if module.theta is module.target else {"target": module.target})
        drafter = load_drafter(args.drafter, verifiers)
    ours, rows = our_ways(module, data, drafter, args), []
    for batch, count in zip(args.batch, rounds, strict=True):
        peers = ways_of_transformers(module, data, batch, args) if module.theta is module.target else {}
        rows += measure(ours | peers, data, batch, count, args)
    args.drafter, args.assistant = (str(path) if path else None for path in (args.drafter, args.assistant))
    result = build_result("block_drafts", args, device, rows, READING)
    number = lambda name: lambda row: format(row[name], ".2f") if name in row else ""  # noqa: E731
    columns = {
        "decoding": lambda row: f"batch {row['batch']}: {row['name']}",
        "ms a token": lambda row: f"{1e3 * row['seconds']['median']:.2f}",
        "ratio of times": as_ratio,
        "CPU": lambda row: with_spread(row["cpu_ratio"]),
        "speed-up": number("speedup"),
        "tokens/forward": number("tokens_per_forward"),
        "accepted": number("accepted_length"),
    }
    show(result, columns, console)
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
