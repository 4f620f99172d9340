"""What the derivative costs: one mean-flow training step against a plain distillation step of the same models.

python benchmarks/meanflow_step.py --batch 128 --length 20 --width 96 --layers 3
Legend: B batch, L length, M masked positions, V vocabulary.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from shapes import FIRST_WORD_ID, add_shape_options, build_base
from timing import (
    Columns,
    Row,
    Stopwatch,
    as_ratio,
    build_result,
    build_row,
    build_table,
    in_mebibytes,
    in_milliseconds,
    interleave,
    new_parser,
    peak_bytes,
    prepare,
    quartiles,
    show,
    timed,
    write_json,
)
from torch import Generator, Tensor, nn

from lightning_modules.logit_flow import LogitFlowModule, MaskingSample
from models.backbones.frozen_layers import FrozenLinear
from models.functional.flow_times import sample_interval
from models.functional.masked_diffusion import mask_probability, mask_tokens
from models.functional.meanflow import flow_loss
from reporting.console import report_console

PLAIN = "(a) plain distillation"
MEANFLOW = "(b) mean flow"
ORDINARY = "(c) (b) with ordinary nn.Linear"
NO_SPLIT = "(d) (b) with every row's derivative"
DIFFERENCES = "(e) (b) with finite differences"

READING = """
a step is loss and backward, without optimizer and logging. A ratio is the step's time over (a)'s in the same round, median
[first, third quartile]: (b) is the cost of learning an average flow instead of copying the teacher. Against (b), (c)
shows what frozen linear layers save, (d) what it saves to leave rows with r = t out of the derivative, and (e) what a
derivative without forward-mode formulas costs. Peak memory is that of the tensors made in the step.
"""


class MeanFlowStep(LogitFlowModule):
    """The module's step without its metrics; `mark` is called when each part of it has ended.

    split: whether rows with r = t skip the derivative.
    """

    split = True
    mark: Callable[[str], None] = staticmethod(lambda part: None)

    def _log_step(self, *_) -> None:
        pass

    def student_logits_and_derivative(
        self, sample: MaskingSample, v: Tensor, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        self.mark("draws and teacher forward")
        sample = sample if self.split else sample._replace(n_equal=0)
        found = super().student_logits_and_derivative(sample, v, generator)
        self.mark("student forward and derivative")
        return found


class PlainStep(MeanFlowStep):
    """Distillation without a flow: KL from the teacher's logits to the student's, at the same draws and positions."""

    def _step(self, batch: dict[str, Tensor], generator: Generator, split: str) -> Tensor:
        x0, attention_mask = batch["input_ids"], batch["attention_mask"]
        shares = {"equal_share": self.options.equal_share, "endpoint_share": self.options.endpoint_share}
        r, t, _ = sample_interval(len(x0), generator, x0.device, law=self.options.time_law, **shares)
        p = mask_probability(t, self.options.eps)
        xt, masked = mask_tokens(x0, batch["response_mask"], p, self.teacher.mask_id, generator)
        embeds = self.teacher.embed(xt).detach()
        with torch.no_grad():
            v = self.teacher.lm_head(self.teacher.hidden(embeds, attention_mask)[masked])  # (M, V)
        self.mark("draws and teacher forward")
        u = self.teacher.lm_head(self.student.hidden(embeds, attention_mask, r, t)[masked])  # (M, V)
        self.mark("student forward and derivative")
        return flow_loss(u, v, self.options.loss).mean()


# -- what is measured ------------------------------------------------------------------------------------------------


def build_variants(args: argparse.Namespace, device: torch.device) -> dict[str, MeanFlowStep]:
    """All steps with the same weights; (c) has a base of its own because the others' linear layers are frozen ones."""
    base = build_base(args, device, vocab_size=args.vocabulary, length=args.length)
    ordinary = copy.deepcopy(base)
    options = {
        "prompt_length": args.prefix,
        "prompt_hidden_size": args.prompt_width,
        "equal_share": args.equal_share,
        "endpoint_share": args.endpoint_share,
    }
    variants = {
        PLAIN: PlainStep(base, **options),
        MEANFLOW: MeanFlowStep(base, **options),
        ORDINARY: MeanFlowStep(ordinary, **options),
        NO_SPLIT: MeanFlowStep(base, **options),
        DIFFERENCES: MeanFlowStep(base, jvp_backend="finite_difference", **options),
    }
    variants[NO_SPLIT].split = False
    for layer in ordinary.modules():
        if type(layer) is FrozenLinear:  # the two classes hold the same and differ in `forward` alone
            layer.__class__ = nn.Linear
    prompt = variants[MEANFLOW].student.soft_prompt
    nn.init.constant_(prompt.gate, 0.5)  # at 0 the prefix would have no derivative
    for module in variants.values():
        module.student.soft_prompt.load_state_dict(prompt.state_dict())
        module.to(device)
    return variants


def build_batch(args: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Random texts (B, L) whose first fifth is the prompt."""
    input_ids = torch.randint(FIRST_WORD_ID, args.vocabulary, (args.batch, args.length)).to(device)
    everywhere = torch.ones_like(input_ids, dtype=torch.bool)
    response = everywhere.clone()
    response[:, : args.length // 5] = False
    return {"input_ids": input_ids, "attention_mask": everywhere, "response_mask": response}


def run_step(module: MeanFlowStep, batch: dict[str, Tensor], seed: int) -> Tensor:
    """Loss and gradients, from the same draws each time."""
    module.zero_grad(set_to_none=True)
    generator = Generator(device=batch["input_ids"].device).manual_seed(seed)
    loss = module._step(batch, generator, "train")
    module.mark("target and loss")
    loss.backward()
    module.mark("backward")
    return loss.detach()


def compare(variants: dict[str, MeanFlowStep], batch: dict[str, Tensor], seed: int) -> dict[str, float]:
    """How far loss and gradients lie from (b)'s: the largest difference relative to the largest value of its tensor."""

    def outcome(name: str) -> list[Tensor]:
        loss = run_step(variants[name], batch, seed)
        return [loss, *(p.grad for p in variants[name].student.soft_prompt.parameters())]

    wanted, apart = outcome(MEANFLOW), {}
    for name in (ORDINARY, NO_SPLIT, DIFFERENCES):
        pairs = zip(outcome(name), wanted, strict=True)
        apart[name] = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() for a, b in pairs)
    for name in (ORDINARY, NO_SPLIT):
        if not apart[name] < 1e-3:
            raise SystemExit(f"{name} differs from (b) by {apart[name]:.1e}: their times cannot be compared")
    return apart


def time_parts(variants: dict[str, MeanFlowStep], batch: dict[str, Tensor], args: argparse.Namespace) -> list[Row]:
    """Median seconds of each part of (a) and (b), in separate rounds: on a GPU every mark waits for the device."""
    device = batch["input_ids"].device
    found: dict[str, dict[str, list[float]]] = {PLAIN: {}, MEANFLOW: {}}

    def measure(name: str) -> float:
        whole, part_of_it = Stopwatch(device, args.clock), Stopwatch(device, args.clock)

        def mark(part: str) -> None:
            found[name].setdefault(part, []).append(part_of_it.seconds())
            part_of_it.start()

        variants[name].mark = mark
        run_step(variants[name], batch, args.seed)
        del variants[name].mark
        return whole.seconds()

    interleave({name: lambda name=name: measure(name) for name in found}, repeats=args.repeats, warmup=args.warmup)
    medians = {
        name: {part: quartiles(seconds[args.warmup :])["median"] for part, seconds in parts.items()}
        for name, parts in found.items()
    }
    whole = sum(medians[PLAIN].values())
    return [
        {
            "part": part,
            "plain": medians[PLAIN][part],
            "meanflow": seconds,
            "more": (seconds - medians[PLAIN][part]) / whole,
        }
        for part, seconds in medians[MEANFLOW].items()
    ]


# -- from options to result ------------------------------------------------------------------------------------------


PART_COLUMNS: Columns = {
    "part": lambda row: row["part"],
    "(a) ms": lambda row: f"{1e3 * row['plain']:.2f}",
    "(b) ms": lambda row: f"{1e3 * row['meanflow']:.2f}",
    "(b) - (a), as a share of (a)'s step": lambda row: f"{row['more']:+.3f}",
}


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=20)
    add_shape_options(parser)
    parser.add_argument("--vocabulary", type=int, default=300)
    parser.add_argument("--batch", type=int, default=128, help="rows")
    parser.add_argument("--length", type=int, default=20, help="tokens in a row, a fifth of them prompt")
    parser.add_argument("--equal-share", type=float, default=0.5, help="rows with r = t")
    parser.add_argument("--endpoint-share", type=float, default=0.25, help="rows with (r, t) = (0, 1)")
    args = parser.parse_args(argv)
    device, console = prepare(args), report_console()
    variants, batch = build_variants(args, device), build_batch(args, device)
    apart = compare(variants, batch, args.seed)

    steps = {name: lambda module=module: run_step(module, batch, args.seed) for name, module in variants.items()}
    measures = {name: timed(step, device, args.clock) for name, step in steps.items()}
    times = interleave(measures, repeats=args.repeats, warmup=args.warmup)
    rows = [build_row(name, times, PLAIN, peak_bytes=peak_bytes(step, device)) for name, step in steps.items()]
    parts = time_parts(variants, batch, args)

    result = build_result("meanflow_step", args, device, rows, READING, difference_from_b=apart, parts=parts)
    columns = {"step": lambda row: row["name"], "ms": in_milliseconds, "ratio": as_ratio, "peak MiB": in_mebibytes}
    show(result, columns, console)
    console.print(
        f"Loss and gradients equal (b)'s: (c) to {apart[ORDINARY]:.0e}, (d) to {apart[NO_SPLIT]:.0e}; (e), which is an "
        f"approximation, to {apart[DIFFERENCES]:.0e}.\n\n"
        "Time of each part, in separate rounds; the last column adds up to (b)/(a) - 1:",
        highlight=False,
    )
    console.print(build_table(parts, PART_COLUMNS))
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
