"""Quality against the time of a text: decoders of finished runs, in turn, on the same prompts.

python benchmarks/frontier_time.py --threads 1 --run plan experiment=plan_write_oracle ckpt_path=RUN/checkpoints/last.ckpt
    --run student experiment=meanflow_llada student_path=RUN/student module.student_forwards=[1,2] module.forwards=[]
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from configured import configured
from timing import Row, as_ratio, build_result, build_row, interleave, new_parser, prepare, show, timed, write_json
from torch import Generator, Tensor

from app.build import build
from app.trained import fill_from_checkpoint
from models.flow.student_files import load_student
from models.interfaces.decoder import Decoder, forward_passes_of
from reporting.console import quiet_libraries, report_console

QUALITY = {
    "valid": ("validity", ".3f"),
    "TV": ("tv", ".2f"),
    "slot acc.": ("slot_accuracy", ".3f"),
    "BLEU": ("bleu", ".1f"),
}
Rows = dict[str, Tensor]

READING = """
A round gives every decoder the same prompts, one decoder after the other; the next round has the next prompts. Quality is of
all texts at the first of --batch; TV depends on how many these are. NFE: mean over them. ms a text: a batch's time over its
texts, median. A ratio is to the first decoder within the round, median [first, third quartile]. Runs may have networks of
different sizes: time compares them as they are, NFE does not.
"""


class Trial:
    """A decoder that is given the next prompts at every call, and keeps the texts of the rounds that count.

    rows: of the test split; a round reads `batch` of them. uncounted: rounds before those that count.
    """

    def __init__(self, decoder: Decoder, rows: Rows, batch: int, uncounted: int, seed: int) -> None:
        self.decoder, self.rows, self.batch, self.seed = decoder, rows, batch, seed
        self.turn = -uncounted
        self.read: list[Tensor] = []
        self.texts: list[Tensor] = []
        self.passes: list[Tensor] = []

    def __call__(self) -> None:
        numbers = (max(0, self.turn) * self.batch + torch.arange(self.batch)) % len(self.rows["input_ids"])
        few = {name: column[numbers.to(column.device)] for name, column in self.rows.items()}
        texts = self.decoder(few, Generator(few["input_ids"].device).manual_seed(self.seed + max(0, self.turn)))
        if self.turn >= 0:
            self.passes.append(forward_passes_of(self.decoder, self.batch).cpu())
            self.read.append(numbers)
            self.texts.append(texts)
        self.turn += 1

    @property
    def forwards(self) -> float:
        return torch.cat(self.passes).double().mean().item()

    def quality(self, data: Any) -> dict[str, float | None]:
        numbers = torch.cat(self.read)
        prompts = {name: column.cpu()[numbers] for name, column in self.rows.items()}
        return data.scorer(prompts, torch.cat(self.texts).cpu()).quality


def finished(name: str, options: list[str], device: torch.device) -> tuple[list[Decoder], Any]:
    """The decoders of a finished run, and its data, as mode=test has them."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = configured(["mode=test", *options], Path(folder))
        if (cfg.ckpt_path is None) == (cfg.student_path is None):
            raise SystemExit(
                f"--run {name} needs the weights of a finished run; type ckpt_path=FILE or student_path=FOLDER"
            )
        with quiet_libraries():
            module, trainer, data = build(cfg)
    data.setup()
    module.trainer, trainer.datamodule = trainer, data
    if cfg.ckpt_path is None:
        module.student = load_student(cfg.student_path, module.teacher)
    else:
        fill_from_checkpoint(module, cfg.ckpt_path)
    module.setup("test")
    module.on_test_start()  # a distillation takes its averages there
    module.to(device).eval()
    return module.decoders(), data


def named(run: str, decoders: list[Decoder]) -> dict[str, Decoder]:
    """Decoders by their names in the table; those of one name by their forward passes, too."""
    often = Counter(decoder.name for decoder in decoders)
    return {f"{run}: {d.name}" + f", NFE {d.forwards}" * (often[d.name] > 1): d for d in decoders}


def shared_rows(corpora: Mapping[str, Any]) -> Rows:
    """The test rows. Errors: SystemExit where two runs have different ones."""
    found = {
        name: data.rows["test"].__getitems__(list(range(len(data.rows["test"])))) for name, data in corpora.items()
    }
    (first, rows), *others = found.items()
    for name, own in others:
        if own.keys() != rows.keys() or not all(torch.equal(own[key], rows[key]) for key in rows):
            raise SystemExit(
                f"the test rows of --run {name} are not those of --run {first}; give both the same data options"
            )
    return rows


def measure(
    decoders: Mapping[str, Decoder], rows: Rows, batch: int, rounds: int, args: argparse.Namespace
) -> tuple[dict[str, Trial], dict[str, Row]]:
    """What every decoder wrote, and the line of its times, seconds a text."""
    trials = {name: Trial(decoder, rows, batch, args.warmup, args.seed) for name, decoder in decoders.items()}
    measures = {name: timed(trial, torch.device(args.device), args.clock) for name, trial in trials.items()}
    times = interleave(measures, repeats=rounds, warmup=args.warmup)
    each = {name: [seconds / batch for seconds in found] for name, found in times.items()}
    return trials, {name: build_row(name, each, next(iter(decoders))) for name in decoders}


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=8)
    parser.add_argument(
        "--run", nargs="+", action="append", required=True, metavar=("NAME", "OPTION"),
        help="a finished run: its name in the table, then experiment=... and its weights, ckpt_path= or student_path=",
    )  # fmt: skip
    parser.add_argument(
        "--without", nargs="*", default=["greedy"], help="leave out decoders with these words in their name"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1], help="texts generated together")
    parser.add_argument("--rounds", type=int, nargs="+", default=None, help="by batch; --repeats unless given")
    args = parser.parse_args(argv)
    device, console = prepare(args), report_console()
    rounds = args.rounds or [args.repeats] * len(args.batch)
    if len(rounds) != len(args.batch):
        raise SystemExit("--rounds needs a number for each of --batch")
    if len({name for name, *_ in args.run}) < len(args.run):
        raise SystemExit("two --run have one name; give each a name of its own")
    # 1. the decoders of all runs, and the prompts that they share
    decoders: dict[str, Decoder] = {}
    corpora: dict[str, Any] = {}
    for name, *options in args.run:
        own, corpora[name] = finished(name, options, device)
        decoders |= named(name, [d for d in own if not any(word in d.name for word in args.without)])
    if not decoders:
        raise SystemExit("--without leaves no decoder; type fewer words")
    rows = {name: column.to(device) for name, column in shared_rows(corpora).items()}
    # 2. their times at every batch size, and the quality of the texts of the first
    (trials, lines), *others = (measure(decoders, rows, b, n, args) for b, n in zip(args.batch, rounds, strict=True))
    found, data = [], corpora[args.run[0][0]]
    for name, trial in trials.items():
        row = lines[name] | {"forwards": trial.forwards, "quality": trial.quality(data)}
        for batch, (_, more) in zip(args.batch[1:], others, strict=True):
            row |= {f"seconds {batch}": more[name]["seconds"], f"ratio {batch}": more[name]["ratio"]}
        found.append(row)
    result = build_result("frontier_time", args, device, found, READING)
    columns = {"decoder": lambda row: row["name"], "NFE": lambda row: f"{row['forwards']:.3g}"}
    for title, (key, form) in QUALITY.items():
        if found[0]["quality"].get(key) is not None:
            columns[title] = lambda row, key=key, form=form: format(row["quality"][key], form)
    for k, batch in enumerate(args.batch):
        end = f" {batch}" if k else ""
        columns[f"ms a text, batch {batch}"] = lambda row, key=f"seconds{end}": f"{1e3 * row[key]['median']:.2f}"
        columns[f"ratio, batch {batch}"] = lambda row, key=f"ratio{end}": as_ratio({"ratio": row[key]})
    show(result, columns, console)
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
