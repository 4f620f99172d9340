"""What online concepts save: tokens a second and key-value bytes, beside the backbone that reads every token in every layer.

python benchmarks/concept_online.py --batch 1 16 --compression 2 4
Legend: B batch, P prompt columns, N new tokens, D width, L layers, R compression.
"""

import argparse
from collections.abc import Callable

import torch
from timing import (
    Columns,
    Row,
    Stopwatch,
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
    with_spread,
    write_json,
)
from torch import Tensor, nn

from models.backbones.causal import build_causal
from models.backbones.key_value_cache import cache_argument, cache_of
from models.online.concept_stack import CompressionSettings
from models.online.cost import flops_share
from models.online.decoder import IncrementalForward
from models.online.model import OnlineConceptModel
from reporting.console import report_console

BASE = "every layer"

READING = """
time and KV are shares of the same backbone's that reads every token in every layer, in the same round, median [first, third
quartile]. expected: the share of multiplications by weights, with output layer, router, codes and linear maps, without
attention scores. saved: the measured saving as a share of the expected one. With fixed commits all rows of a batch commit at
the same steps; with `null` at different steps, so that at batch 16 some row commits in nearly every step. prefill MiB: peak
memory of a prefill. middle: time of the middle layers alone over P / R concepts. Weights are random: nothing here is about
quality.
"""


def build_backbone(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(args.seed)
    model = build_causal(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        num_hidden_layers=sum(args.split),
        num_attention_heads=args.width // 64,
        num_key_value_heads=max(1, args.width // 128),
        intermediate_size=3 * args.width,
        max_position_embeddings=4096,
        rope_theta=1e6,
        architecture="qwen3",
    )
    return model.to(device).eval()


def build_online(
    backbone: nn.Module, growth: str, compression: float, args: argparse.Namespace, prompt: Tensor
) -> OnlineConceptModel:
    """A model on the same weights. Rate control brings a learned router to the wanted rate."""
    options = {"codes": args.codes, "growth": growth, "compression": compression, "attention": args.attention}
    model = OnlineConceptModel(backbone, split=list(args.split), **options).to(prompt.device).eval()
    router = model.stack.router
    with torch.no_grad():
        for _ in range(40 if router.learned else 0):
            (level,) = model.read(prompt)[1]
            router.correct_offset(level.routing.realised, compression, level.routing.moments)
    return model


# -- the arithmetic ------------------------------------------------------------------------------------------------------


def expected_bytes(split: list[int], compression: float, length: int) -> float:
    """Share of cached positions: [Ls + (Lm + Ld) / R] / L, and deep tails of (R - 1) / 2 positions on average."""
    shallow, middle, deep = split
    tail = deep * (compression - 1) / 2 / length
    return (shallow + (middle + deep) / compression + tail) / (shallow + middle + deep)


# -- measuring -----------------------------------------------------------------------------------------------------------


class BackboneForward:
    """The backbone with transformers' own cache, with the interface of `IncrementalForward`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.cache = cache_of(out)
        return out.logits[:, -1]

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids.unsqueeze(1), **cache_argument(self.cache), use_cache=True).logits[:, -1]

    @property
    def kv_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.cache.layers for x in (layer.keys, layer.values))


def decoding(
    forward: BackboneForward | IncrementalForward, prompt: Tensor, new: int, device: torch.device, clock: str
) -> Callable[[], float]:
    """A function that reads the prompt and returns the seconds of the `new` decoding steps after it."""

    def measure() -> float:
        logits = forward.prefill(prompt)
        watch = Stopwatch(device, clock)
        for _ in range(new):
            logits = forward.step(logits.argmax(-1))
        return watch.seconds()

    return measure


def middle_alone(model: OnlineConceptModel, batch: int, concepts: int) -> Callable[[], Tensor]:
    states = torch.randn(batch, concepts, model.config.hidden_size, device=model.setting.device)
    positions = torch.arange(concepts, device=states.device).expand(batch, -1)
    return torch.no_grad()(lambda: model.stack.middle.run(states, positions, None))


def measure_batch(batch: int, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Rows of the backbone and of every growth and compression at one batch size."""
    backbone = build_backbone(args, device)
    prompt = torch.randint(args.vocabulary, (batch, args.prompt), device=device)
    passes: dict[str, BackboneForward | IncrementalForward] = {BASE: BackboneForward(backbone)}
    for growth in args.growth:
        for compression in args.compression:
            model = build_online(backbone, growth, compression, args, prompt)
            passes[f"{growth}, R = {compression:g}"] = IncrementalForward(model)
    rounds = {"repeats": args.repeats, "warmup": args.warmup}
    prefill = {name: timed(lambda r=r: r.prefill(prompt), device, args.clock) for name, r in passes.items()}
    decode = {name: decoding(r, prompt, args.new, device, args.clock) for name, r in passes.items()}
    peaks = {name: peak_bytes(lambda r=r: r.prefill(prompt), device) for name, r in passes.items()}
    times = {"prefill": interleave(prefill, **rounds), "decode": interleave(decode, **rounds)}
    rows = []
    for name, forward in passes.items():
        for kind, tokens in (("prefill", batch * args.prompt), ("decode", batch * args.new)):
            row = build_row(name, times[kind], BASE, batch=batch, kind=kind)
            row |= {"tokens_per_s": tokens / row["seconds"]["median"], "kv_bytes": forward.kv_bytes}
            row |= {
                "kv_share": forward.kv_bytes / passes[BASE].kv_bytes,
                "expected": None,
                "middle_ms": None,
                "peak_bytes": peaks[name],
            }
            if isinstance(forward, IncrementalForward):
                row |= of_online(forward, kind, batch, args, device)
                row["saved"] = (1 - row["ratio"]["median"]) / (1 - row["expected"])
            rows.append(row)
    return rows


def of_online(
    forward: IncrementalForward, kind: str, batch: int, args: argparse.Namespace, device: torch.device
) -> dict:
    """Expected shares at the realised compression, and the time of the middle layers alone."""
    model, length = forward.model, args.prompt + args.new
    realised = length * batch / int(forward.concepts.sum())
    found = {"realised": realised, "expected": flops_share(model, realised)}
    found["expected_kv"] = expected_bytes(model.split, realised, length)
    if kind == "prefill":
        alone = timed(middle_alone(model, batch, round(args.prompt / realised)), device, args.clock)
        found["middle_ms"] = 1e3 * min(interleave({"m": alone}, repeats=args.repeats, warmup=1)["m"])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--width", type=int, default=512, help="heads are 64 wide, two share their keys and values")
    parser.add_argument("--split", type=int, nargs=3, default=[2, 10, 2], help="shallow, middle and deep layers")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--compression", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument(
        "--growth", nargs="+", choices=("fixed", "null", "autoregressive", "accumulate"), default=["fixed"]
    )
    parser.add_argument("--attention", choices=("sdpa", "flex"), default="sdpa", help="of the deep layers")
    args = parser.parse_args(argv)
    if min(args.compression) <= 1 or args.width % 128:
        parser.error("--compression has to be above 1, and --width a multiple of 128")
    device, console = prepare(args), report_console()
    check_equal(args, device)
    rows = [row for batch in args.batch for row in measure_batch(batch, args, device)]
    result = build_result("concept_online", args, device, rows, READING)
    columns: Columns = {
        "model": lambda row: f"{row['kind']}, batch {row['batch']}: {row['name']}",
        "ms": in_milliseconds,
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "time": lambda row: with_spread(row["ratio"]),
        "expected": lambda row: "-" if row["expected"] is None else f"{row['expected']:.3f}",
        "saved": lambda row: "-" if row["expected"] is None else f"{row['saved']:.0%}",
        "KV": lambda row: f"{row['kv_share']:.3f}",
        "expected KV": lambda row: "-" if row["expected"] is None else f"{row['expected_kv']:.3f}",
        "prefill MiB": in_mebibytes,
        "middle ms": lambda row: "-" if row["middle_ms"] is None else f"{row['middle_ms']:.1f}",
    }
    show(result, columns, console)
    write_json(result, args.json, columns)


def check_equal(args: argparse.Namespace, device: torch.device) -> None:
    """Exit unless model and backbone have the same logits without compression."""
    backbone = build_backbone(args, device)
    model = OnlineConceptModel(backbone, split=list(args.split), codes=args.codes).to(device).eval()
    ids = torch.arange(16, device=device).unsqueeze(0) % args.vocabulary
    with torch.no_grad():
        ours = model.logits(model.read(ids, settings=CompressionSettings(1.0, 0.0))[0])
        gap = (ours - backbone(input_ids=ids).logits).abs().max().item()
    if gap > 1e-3:
        raise SystemExit(f"without compression the logits differ from the backbone's by {gap:.1e}")


if __name__ == "__main__":
    main()
