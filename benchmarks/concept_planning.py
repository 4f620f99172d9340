"""Time of a training step of planner and executor with slots planned in sequence, types in parallel, or all slots at once.

python benchmarks/concept_planning.py
Legend: B batch, P prompt columns, R response columns, S slots.
"""

import argparse

import torch
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

from models.backbones.causal import build_causal
from models.functional.bits_per_byte import token_nll
from models.functional.plan_nll import plan_nll
from models.plans.executor import AutoregressiveExecutor
from models.plans.planner import Plan, Planner, relaxed
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import ConceptVocabulary
from reporting.console import report_console

SEQUENTIAL = "sequential"
FORMS = (SEQUENTIAL, "types", "slots")

READING = """
A ratio is the time divided by that of sequential planning in the same round, median [first, third quartile]; times faster is
its inverse. Every row is forward and backward of one model. The first rows draw plans from the posterior; only this differs
between the forms. The whole step adds the executor's NLL of the text and the prior's NLL of the plan, one forward pass each in
every form. Before timing it was checked that a single type has the same gradients in sequence and in parallel.
"""


def build_model(args: argparse.Namespace, types: int, device: torch.device) -> UnifiedModel:
    backbone = build_causal(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=args.intermediate or 8 * args.width // 3,
        max_position_embeddings=512,
        rope_theta=10_000.0,
        initializer_range=args.width**-0.5,
    )
    kinds = {f"t{k}": {"codes": args.codes, "most": args.most} for k in range(types)}
    return UnifiedModel(backbone, ConceptVocabulary(kinds, args.vocabulary)).to(device)


def draw(model: UnifiedModel, form: str, text: Tensor, seed: int) -> Plan:
    """Plans of text (B, T)."""
    mask = torch.ones_like(text, dtype=torch.bool)
    noise = Generator(device=text.device).manual_seed(seed)
    return Planner(model, form).draw(text, mask, relaxed(noise, 1.0))


def step(model: UnifiedModel, form: str, text: Tensor, args: argparse.Namespace) -> Tensor:
    """Draw plans, NLL of text and plans; the loss after its backward pass."""
    model.zero_grad(set_to_none=True)
    plan, response, prompt = draw(model, form, text, args.seed), text[:, args.prompt :], text[:, : args.prompt]
    nll = token_nll(AutoregressiveExecutor(model).logits(plan.ids, plan.embeds, response), response).mean()
    log_p = Planner(model).score(prompt, torch.ones_like(prompt, dtype=torch.bool), plan.choices).log_softmax(-1)
    loss = nll + plan_nll(log_p, plan.choices, plan.open_slots).mean()
    loss.backward()
    return loss.detach()


def draw_alone(model: UnifiedModel, form: str, text: Tensor, args: argparse.Namespace) -> None:
    model.zero_grad(set_to_none=True)
    draw(model, form, text, args.seed).embeds.square().mean().backward()


def check_equal(args: argparse.Namespace, text: Tensor) -> float:
    """The largest difference of gradients between sequential and parallel planning of one type; stops where they differ."""
    model, found = build_model(args, 1, text.device), {}
    for form in (SEQUENTIAL, "types"):
        loss = step(model, form, text, args)
        found[form] = [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    largest = max(float((a - b).abs().max()) for a, b in zip(*found.values(), strict=True))
    if largest > 1e-3:
        raise SystemExit(f"one type beside no other differs from planning in sequence by {largest:.1e}")
    return largest


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=9)
    for name, default in (("types", 8), ("most", 4), ("codes", 64), ("batch", 32), ("prompt", 16), ("response", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("vocabulary", 500), ("width", 96), ("layers", 3), ("heads", 4), ("intermediate", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    device, console = prepare(args), report_console()
    text = torch.randint(3, args.vocabulary, (args.batch, args.prompt + args.response), device=device)
    largest = check_equal(args, text)
    model, rows = build_model(args, args.types, device), list[Row]()
    for part, run in (("drawing plans", draw_alone), ("whole step", step)):
        measures = {
            form: timed(lambda form=form, run=run: run(model, form, text, args), device, args.clock) for form in FORMS
        }
        times = interleave(measures, repeats=args.repeats, warmup=args.warmup)
        rows += [build_row(form, times, SEQUENTIAL, part=part, slots=args.types * args.most) for form in FORMS]
    result = build_result("concept_planning", args, device, rows, READING, largest_difference=largest)
    columns = {
        "planning": lambda row: f"{row['part']}, {row['slots']} slots: {row['name']}",
        "ms": in_milliseconds,
        "ratio of times": as_ratio,
        "times faster": lambda row: f"{1 / row['ratio']['median']:.2f}",
    }
    show(result, columns, console)
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
