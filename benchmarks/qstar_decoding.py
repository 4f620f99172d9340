"""What drafts save: q* decoding against evaluating both models at every token, and against transformers' assisted generation.

python benchmarks/qstar_decoding.py --batch 1 8 32
Legend: B batch, N new tokens, gamma drafted tokens, c time of a drafter's forward over the checker's (or both checkers').
"""

import argparse

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

from models.functional.qstar_speed import SPEEDUPS, best_gamma, wait_for_the_slowest
from models.speculative.cached_scores import CachedScores
from models.speculative.decode import decode_qstar
from models.speculative.distribution import MixtureDist
from models.speculative.random_source import TorchRandomSource
from models.speculative.roles import roles
from models.speculative.state import QStarOutput
from reporting.console import report_console

NAIVE = "both models at every token"
PLACES = 5  # of the longer of the two forwards whose times give w

READING = """
All models have random weights, one trunk of layers and layers of their own whose output is scaled by --apart; that sets beta,
the share of drafted tokens kept. A ratio is the time over that of evaluating both models at every token (with caches, the same
batch and round), median [first, third quartile]. w: what each further place adds to a checker's forward, as a share of it.
formula: the expected speed-up at the measured beta, c and gamma, were w = 0; wide: the same with w; slowest: with w, until the
last row of the batch is done, as if rows that are done cost as before. gamma is the best for wide; 0 drafts nothing, as nothing
would pay. alpha = 0 is ordinary speculative sampling of pi_t by pi_theta, which transformers' assisted generation does too;
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
    """Median seconds of a forward that reads `tokens` new ones behind a cached prompt."""
    seconds = []
    for _ in range(args.warmup + args.repeats):
        scores = CachedScores(model)
        ids = torch.randint(0, args.vocabulary, (batch, args.prompt + 32), device=device)
        place = torch.full((batch,), args.prompt, device=device)
        scores(ids, place, 1)
        watch = Stopwatch(device, args.clock)
        scores(ids, place + 1, tokens)
        seconds.append(watch.seconds())
    return sorted(seconds[args.warmup :])[args.repeats // 2]


class Pair:
    """Two models, perhaps a third that drafts, and prompts for them."""

    def __init__(self, name: str, theta, target, assistant, args: argparse.Namespace, device: torch.device) -> None:
        self.name, self.models = name, {"theta": theta, "target": target}
        if assistant is not None:
            self.models["assistant"] = assistant
        self.args, self.device = args, device

    def decode(self, prompts: Tensor, **options) -> QStarOutput:
        scores = {name: CachedScores(model) for name, model in self.models.items()}
        if options.get("draft") != "assistant":
            scores.pop("assistant", None)
        theta, target = scores.pop("theta"), scores.pop("target")
        rng = TorchRandomSource(Generator(device=self.device).manual_seed(self.args.seed))
        return decode_qstar(theta, target, prompts, max_new_tokens=self.args.new, rng=rng, **scores, **options)


def measure_pair(pair: Pair, batch: int) -> list[Row]:
    """A row for the plain loop and for every scheme, at the draft length that the formula prefers."""
    args, device = pair.args, pair.device
    prompts = torch.randint(0, args.vocabulary, (batch, args.prompt), device=device)
    one, more = (
        {name: forward_seconds(model, batch, places, args, device) for name, model in pair.models.items()}
        for places in (1, PLACES)
    )
    schemes, runs = {}, {NAIVE: lambda: pair.decode(prompts, gamma=0)}
    for draft in ("theta", "alternate", *(["assistant"] if "assistant" in pair.models else [])):
        drafter, checkers, _, formula = roles(draft, 1.0)
        checking = sum(one[name] for name in checkers)
        cost = one[drafter] / checking
        wide = max(0.0, sum(more[name] for name in checkers) / checking - 1) / (PLACES - 1)
        options = {"draft": draft, "cost": min(cost, 1.0)}
        beta = pair.decode(prompts, gamma=4, **options).acceptance[drafter]
        options["gamma"] = best_gamma(beta, cost, formula, wide=wide) if args.gamma is None else args.gamma
        schemes[f"draft={draft}"] = expectation(formula, options["gamma"], beta, cost, wide, args.new, batch)
        runs[f"draft={draft}"] = lambda options=options: pair.decode(prompts, **options)
    times = interleave(
        {name: timed(run, device, args.clock) for name, run in runs.items()}, repeats=args.repeats, warmup=args.warmup
    )
    return [build_row(name, times, NAIVE, pair=pair.name, batch=batch, **schemes.get(name, {})) for name in runs]


def expectation(formula: str, gamma: int, beta: float, cost: float, wide: float, tokens: int, batch: int) -> Row:
    """What is put into the formula, and what comes out: as it stands, with w, and with w for the slowest row of a batch."""
    said = {"beta": beta, "cost": cost, "w": wide, "gamma": gamma}
    if gamma == 0:
        return said | dict.fromkeys(("formula", "wide", "slowest"), 1.0)
    with_w = SPEEDUPS[formula](gamma, beta, cost, wide)
    slowest = with_w / wait_for_the_slowest(gamma, beta, tokens, batch)
    return said | {"formula": SPEEDUPS[formula](gamma, beta, cost), "wide": with_w, "slowest": slowest}


def measure_peer(pair: Pair, gamma: int = 4) -> list[Row]:
    """alpha = 0: pi_t alone, ours, and transformers' assisted generation, one text, the same models and draft length."""
    args, device = pair.args, pair.device
    prompts = torch.randint(0, args.vocabulary, (1, args.prompt), device=device)
    theta, target = pair.models["theta"], pair.models["target"]
    plain = {"do_sample": True, "top_k": 0, "max_new_tokens": args.new, "min_new_tokens": args.new}
    theta.generation_config.num_assistant_tokens = gamma
    theta.generation_config.num_assistant_tokens_schedule = "constant"
    theta.generation_config.assistant_confidence_threshold = 0.0
    options = {"mixture": MixtureDist(theta_weight=0.0), "draft": "theta", "gamma": gamma}
    runs = {
        "pi_t alone (transformers)": lambda: target.generate(prompts, **plain),
        "alpha = 0, draft=theta": lambda: pair.decode(prompts, **options),
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
    write_json(result, args.json)


if __name__ == "__main__":
    main()
