"""What a large body needs on every rank, by `trainer=ddp` and `trainer=fsdp`: bytes and traffic, computed from the shapes.

Nothing is run or measured. Activations are the estimate of `models.backbones.memory`; what a framework adds, such as buffers of
its collectives and fragments of its allocator, is not in it.
Legend: V vocabulary, D width, F feed-forward width, N layers, W ranks, P parameters, b bytes a number.
"""

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import device

from models.backbones.llada import LladaConfig
from models.backbones.memory import describe_footprint
from models.flow.soft_prompt import SoftPrompt

GB = 1e9
# how often a step multiplies by the frozen linear layers: (forward passes, tangents, backward passes), by what is trained
GATHERS = {
    "noisy mask, adapt": (2, 0, 1),
    "noisy mask, flow (psd)": (5, 0, 2),
    "noisy mask, flow (meanflow)": (7, 1, 3),
    "noisy mask, polish": (3.25, 0, 1.25),  # every fourth step: 8 forward passes for its pairs, and one more of its own
    "logit flow": (3, 1, 2),
    "step halving": (3, 0, 1),
}


@dataclass(frozen=True)
class Shape:
    """Parameters of a body without biases: `layer` of one layer's products, `table` of the embeddings, `head` of the output."""

    vocab_size: int
    width: int
    feed_forward: int
    layers: int

    @property
    def layer(self) -> int:
        """q, k, v, o and three of the feed-forward."""
        return 4 * self.width**2 + 3 * self.width * self.feed_forward

    @property
    def table(self) -> int:
        return self.vocab_size * self.width

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.width

    @property
    def linear(self) -> int:
        """All layers and the head."""
        return self.layers * self.layer + self.table

    @property
    def whole(self) -> int:
        return self.linear + self.table + self.norms

    def lora(self, rank: int) -> int:
        """Adapters on every product of the layers."""
        return self.layers * rank * (8 * self.width + 3 * (self.width + self.feed_forward))

    def config(self) -> LladaConfig:
        return LladaConfig(
            mask_token_id=0, vocab_size=self.vocab_size, hidden_size=self.width, intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers, num_attention_heads=max(1, self.width // 128),
        )  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank, and bytes that it receives in one step."""

    weights: float
    gathered: float
    gradients: float
    optimiser: float
    averages: float
    activations: float
    traffic: float

    @property
    def memory(self) -> float:
        return sum((self.weights, self.gathered, self.gradients, self.optimiser, self.averages, self.activations))


def received(size: float, ranks: int) -> float:
    """Of an all-gather to, or a reduce-scatter from, `size` bytes; an all-reduce is one of each."""
    return size * (ranks - 1) / ranks


def distillation(shape: Shape, ranks: int, split: bool, kind: str, rank: int, batch: int, length: int) -> Budget:
    """A frozen base in bfloat16 with adapters in float32: what trains is whole on every rank, with two averages."""
    b = 2
    with device("meta"):
        prompt = sum(p.numel() for p in SoftPrompt(shape.config(), prompt_length=8, hidden_size=128).parameters())
    trained = shape.lora(rank) + prompt + shape.width**2  # and the matrix that reads the noise
    uses = sum(GATHERS[kind])
    footprint = describe_footprint(shape.config(), "bfloat16", batch_size=batch, length=length)
    return Budget(
        weights=(shape.linear / ranks + shape.table + shape.norms if split else shape.whole) * b + 4 * trained,
        gathered=max(shape.table, shape.width * shape.feed_forward) * b if split else 0,
        gradients=4 * trained,
        optimiser=8 * trained,
        averages=8 * trained,
        activations=footprint.distillation - footprint.weights,
        traffic=(uses * received(shape.linear * b, ranks) if split else 0) + 2 * received(4 * trained, ranks),
    )


def training(shape: Shape, ranks: int, split: bool, b: int, batch: int, length: int, recompute: bool) -> Budget:
    """All weights train (AdamW, one average): split, one layer at a time and all that is in no layer are whole."""
    own = shape.whole / (ranks if split else 1)
    rest = 2 * shape.table + shape.width  # whole for the whole step, and so are its gradients
    footprint = describe_footprint(shape.config(), "bfloat16" if b == 2 else "float32", batch_size=batch, length=length)
    activations = footprint.distillation - footprint.weights
    if recompute:  # the input of every layer, one layer's insides, the logits
        logits = 36 * batch * length * shape.vocab_size
        activations = logits + (activations - logits) / shape.layers + batch * length * shape.layers * shape.width * b
    in_layers = shape.layers * (shape.layer + 2 * shape.width)
    traffic = 3 * received(in_layers * b, ranks) + 2 * received(rest * b, ranks)
    return Budget(
        weights=own * b,
        gathered=(2 * rest + 3 * shape.layer) * b if split else 0,
        gradients=own * b,
        optimiser=2 * own * b,
        averages=own * b,
        activations=activations,
        traffic=traffic if split else 2 * received(shape.whole * b, ranks),
    )


def rows(args: argparse.Namespace, shape: Shape) -> list[tuple[str, str, int, Budget]]:
    found = []
    for name, split in (("ddp", False), ("fsdp", True)):
        for ranks in args.ranks:
            for kind in GATHERS:
                if split or kind == next(iter(GATHERS)):  # by ddp they are alike
                    what = kind if split else "distillation, any"
                    more = (args.lora_rank, args.batch, args.length)
                    found.append((what, name, ranks, distillation(shape, ranks, split, kind, *more)))
            for b, precision in ((4, "32-true"), (2, "bf16-true")):
                for recompute in (False, True):
                    what = f"all weights, {precision}{', recompute' if recompute else ''}"
                    own = training(shape, ranks, split, b, args.batch, args.length, recompute)
                    found.append((what, name, ranks, own))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, value in (("vocab-size", 126_464), ("width", 4096), ("feed-forward", 12_288), ("layers", 32)):
        parser.add_argument(f"--{name}", type=int, default=value, help="of the body; LLaDA 8B's unless given")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--batch", type=int, default=4, help="rows of a rank")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--lora-rank", type=int, default=16)
    args = parser.parse_args()
    shape = Shape(args.vocab_size, args.width, args.feed_forward, args.layers)
    columns = ("weights", "gathered", "gradients", "optimiser", "averages", "activations", "memory", "traffic")
    table = Table(
        title=f"computed, not measured: {shape.whole:,} parameters, {args.batch} x {args.length} tokens a rank; GB"
    )
    for name in ("what trains", "trainer", "ranks", *columns):
        table.add_column(name, justify="left" if name in ("what trains", "trainer") else "right")
    for what, name, ranks, budget in rows(args, shape):
        table.add_row(what, name, str(ranks), *(f"{getattr(budget, column) / GB:.1f}" for column in columns))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
