"""Speed-ups of q* decoding over running both models for every token, and beside transformers' assisted generation.

python benchmarks/qstar_decoding.py --batch 1 8 32
Legend: B batch, N new tokens, gamma drafted tokens, c time of a forward pass of the drafter over one of all its verifiers.
"""

import argparse
from dataclasses import replace

import torch
from timing import (
    Row,
    Stopwatch,
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
from transformers import Qwen3Config, Qwen3ForCausalLM

from models.functional.qstar_speed import SPEEDUPS, best_gamma, slowest_row_rounds
from models.speculative.cached_scores import CachedScores
from models.speculative.decode import decode_qstar
from models.speculative.distribution import MixtureDist
from models.speculative.options import Draft, DraftOptions
from models.speculative.random_source import TorchRandomSource
from models.speculative.roles import roles
from models.speculative.state import QStarOutput, TextRules
from reporting.console import report_console

NAIVE = "both models at every token"
POSITIONS = 5  # of the longer of the two forward passes whose times give w

READING = """
All models have random weights: a common trunk of layers, and layers of their own whose output is scaled by --apart. That sets
beta, the acceptance rate. Ratio: the time over that of running both models for every token (with caches, the same batch and
round), median [first, third quartile]. w: what each further position adds to a verifier's forward pass, as a fraction of it.
formula: the expected speed-up at the measured beta, c and gamma, for w = 0. wide: the same with w. slowest: with w, until the
last row of the batch is done, as if rows that are done cost as before. gamma is the best one for wide; 0 where no draft is
expected to save time. alpha = 0 is speculative sampling of pi_t by pi_theta, as in transformers' assisted generation;
there a ratio is to pi_t alone, token by token.
"""


def build(args: argparse.Namespace, layers: int, seed: int) -> Qwen3ForCausalLM:
    """The common trunk, then layers - trunk layers of its own."""
    config = Qwen3Config(
        vocab_size=args.vocabulary, hidden_size=args.width, num_hidden_layers=layers, num_attention_heads=args.heads,
        num_key_value_heads=args.heads, head_dim=args.width // args.heads, intermediate_size=8 * args.width // 3,
        tie_word_embeddings=False, eos_token_id=None, pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    model = Qwen3ForCausalLM(config)
    torch.manual_seed(args.seed)  # everything that all models share is drawn first, in the same order
    body = model.model
    shared = [body.embed_tokens, model.lm_head, *body.layers[: args.trunk]]
    own = list(body.layers[args.trunk :])
    with torch.no_grad():
        for module in shared:
            draw_weights(module, args.width)
        model.lm_head.weight *= args.sharpness
        torch.manual_seed(args.seed + 1 + seed)
        for module in own:
            draw_weights(module, args.width)
            for projection in (module.self_attn.o_proj, module.mlp.down_proj):
                projection.weight *= args.apart / max(1, len(own)) ** 0.5
    return model.to(args.device).eval()


def draw_weights(module: torch.nn.Module, width: int) -> None:
    for weight in module.parameters():
        if weight.ndim >= 2:
            weight.normal_(std=width**-0.5)


def forward_seconds(
    model: Qwen3ForCausalLM, batch: int, tokens: int, args: argparse.Namespace, device: torch.device
) -> float:
    """Median seconds of a forward pass that reads `tokens` new ones behind a cached prompt."""
    seconds = []
    for _ in range(args.warmup + args.repeats):
        scores = CachedScores(model)
        ids = torch.randint(0, args.vocabulary, (batch, args.prompt + 32), device=device)
        lengths = torch.full((batch,), args.prompt, device=device)
        scores(ids, lengths, 1)
        watch = Stopwatch(device, args.clock)
        scores(ids, lengths + 1, tokens)
        seconds.append(watch.seconds())
    return sorted(seconds[args.warmup :])[args.repeats // 2]


class Pair:
    """Two models, perhaps a third that drafts, and prompts for them."""

    def __init__(self, name: str, theta, target, assistant, args: argparse.Namespace, device: torch.device) -> None:
        self.name, self.models = name, {"theta": theta, "target": target}
        if assistant is not None:
            self.models["assistant"] = assistant
        self.args, self.device = args, device

    def decode(self, prompts: Tensor, drafting: DraftOptions, mixture: MixtureDist | None = None) -> QStarOutput:
        scores = {name: CachedScores(model) for name, model in self.models.items()}
        if drafting.draft != "assistant":
            scores.pop("assistant", None)
        theta, target = scores.pop("theta"), scores.pop("target")
        rng = TorchRandomSource(Generator(device=self.device).manual_seed(self.args.seed))
        return decode_qstar(
            theta, target, prompts, drafting, TextRules(self.args.new), rng=rng, mixture=mixture, **scores
        )


def measure_pair(pair: Pair, batch: int) -> list[Row]:
    """A row for the plain loop and for every scheme, at the draft length that the formula prefers."""
    args, device = pair.args, pair.device
    prompts = torch.randint(0, args.vocabulary, (batch, args.prompt), device=device)
    one, more = (
        {name: forward_seconds(model, batch, positions, args, device) for name, model in pair.models.items()}
        for positions in (1, POSITIONS)
    )
    schemes, runs = {}, {NAIVE: lambda: pair.decode(prompts, DraftOptions(gamma=0))}
    drafts: list[Draft] = ["theta", "alternate", *(["assistant"] if "assistant" in pair.models else [])]
    for draft in drafts:
        drafter, verifiers, _, formula = roles(DraftOptions(draft))
        verifying = sum(one[name] for name in verifiers)
        cost = one[drafter] / verifying
        position_cost = max(0.0, sum(more[name] for name in verifiers) / verifying - 1) / (POSITIONS - 1)
        drafting = DraftOptions(draft, gamma=4, cost=min(cost, 1.0))
        beta = pair.decode(prompts, drafting).acceptance[drafter]
        gamma = args.gamma
        if gamma is None:
            gamma = best_gamma(beta, cost, formula, position_cost=position_cost)
        schemes[f"draft={draft}"] = expectation(formula, gamma, beta, cost, position_cost, args.new, batch)
        drafting = replace(drafting, gamma=gamma)
        runs[f"draft={draft}"] = lambda drafting=drafting: pair.decode(prompts, drafting)
    times = interleave(
        {name: timed(run, device, args.clock) for name, run in runs.items()}, repeats=args.repeats, warmup=args.warmup
    )
    return [build_row(name, times, NAIVE, pair=pair.name, batch=batch, **schemes.get(name, {})) for name in runs]


def expectation(
    formula: str, gamma: int, beta: float, cost: float, position_cost: float, tokens: int, batch: int
) -> Row:
    """The inputs of the formula, and its results: without w, with w, and with w for the slowest row of a batch."""
    inputs = {"beta": beta, "cost": cost, "w": position_cost, "gamma": gamma}
    if gamma == 0:
        return inputs | dict.fromkeys(("formula", "wide", "slowest"), 1.0)
    with_w = SPEEDUPS[formula](gamma, beta, cost, position_cost)
    slowest = with_w / slowest_row_rounds(gamma, beta, tokens, batch)
    return inputs | {"formula": SPEEDUPS[formula](gamma, beta, cost), "wide": with_w, "slowest": slowest}


def measure_peer(pair: Pair, gamma: int = 4) -> list[Row]:
    """alpha = 0: pi_t alone, ours, and transformers' assisted generation, one text, the same models and draft length."""
    args, device = pair.args, pair.device
    prompts = torch.randint(0, args.vocabulary, (1, args.prompt), device=device)
    theta, target = pair.models["theta"], pair.models["target"]
    plain = {"do_sample": True, "top_k": 0, "max_new_tokens": args.new, "min_new_tokens": args.new}
    theta.generation_config.num_assistant_tokens = gamma
    theta.generation_config.num_assistant_tokens_schedule = "constant"
    theta.generation_config.assistant_confidence_threshold = 0.0
    drafting, mixture = DraftOptions("theta", gamma=gamma), MixtureDist(theta_weight=0.0)
    runs = {
        "pi_t alone (transformers)": lambda: target.generate(prompts, **plain),
        "alpha = 0, draft=theta": lambda: pair.decode(prompts, drafting, mixture),
        "assisted generation (transformers)": lambda: target.generate(prompts, assistant_model=theta, **plain),
    }
    per_forward = {name: args.new / count_forwards(target, run) for name, run in runs.items()}
    times = interleave(
        {name: timed(run, device, args.clock) for name, run in runs.items()}, repeats=args.repeats, warmup=args.warmup
    )
    first = next(iter(runs))
    return [
        build_row(name, times, first, pair=f"{pair.name}, alpha = 0", batch=1, tokens_per_forward=per_forward[name])
        for name in runs
    ]


def count_forwards(model: Qwen3ForCausalLM, run) -> int:
    count = []
    handle = model.register_forward_pre_hook(lambda *_: count.append(1))
    run()
    handle.remove()
    return len(count)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=20, help="of the large models")
    parser.add_argument(
        "--trunk", type=int, default=2, help="layers that all models share; the small model is the trunk"
    )
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sharpness", type=float, default=3.0, help="spread of the logits")
    parser.add_argument("--apart", type=float, default=0.5, help="how much a model's own layers change")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--gamma", type=int, help="tokens of a draft; the best one for the measured costs unless given")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    args = parser.parse_args(argv)
    device, console = prepare(args), report_console()
    small, theta, target = build(args, args.trunk, 0), build(args, args.layers, 1), build(args, args.layers, 2)
    pairs = [
        Pair("equal sizes", theta, target, small, args, device),
        Pair("small and large", small, target, None, args, device),
    ]
    rows = [row for batch in args.batch for pair in pairs for row in measure_pair(pair, batch)]
    rows += [row for pair in pairs for row in measure_peer(pair)]
    for row in rows:
        row["speedup"] = 1 / row["ratio"]["median"]
    result = build_result("qstar_decoding", args, device, rows, READING)
    number = lambda name, form: lambda row: format(row[name], form) if name in row else ""  # noqa: E731
    columns = {
        "decoding": lambda row: f"{row['pair']}, batch {row['batch']}: {row['name']}",
        "ms": in_milliseconds,
        "ratio of times": as_ratio,
        "speed-up": number("speedup", ".2f"),
        "formula": number("formula", ".2f"),
        "wide": number("wide", ".2f"),
        "slowest": number("slowest", ".2f"),
        "beta": number("beta", ".2f"),
        "c": number("cost", ".2f"),
        "w": number("w", ".2f"),
        "gamma": number("gamma", "d"),
        "tokens/forward": number("tokens_per_forward", ".2f"),
    }
    show(result, columns, console)
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
