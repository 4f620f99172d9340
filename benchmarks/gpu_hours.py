"""What an experiment with a noisy-mask student will need of one device: GPU hours and memory, computed from its configuration.

    python benchmarks/gpu_hours.py experiment=flow_lm1b
    python benchmarks/gpu_hours.py experiment=flow_owt
    python benchmarks/gpu_hours.py --peak 312 --utilisation 0.3 experiment=flow_lm1b trainer.max_steps=100000

Nothing is run or measured. Hours are FLOPs of all steps / (peak x utilisation); a training shows its own utilisation as
speed/mfu. Validation and the final comparison are not in them. Activations are the estimate of `models.backbones.memory`, and
all positions of a student's row count as masked.
Legend: V vocabulary, D width, N layers, L tokens of a row.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from cluster_budget import GB, Shape
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_modules.noisy_mask_flow import STAGES
from lightning_modules.training.stages import Stages
from models.backbones.memory import describe_footprint
from models.flow.options import NoisyMaskFlowOptions

CONF = Path(__file__).resolve().parents[1] / "conf"
# copies of all weights in float32: the trained ones with their gradients, AdamW's two, and averages or snapshots
TEACHER_COPIES = 1 + 1 + 2 + 1
STUDENT_COPIES = 1 + 1 + 2 + 2 + 1  # and the frozen teacher
MASKED_AT_ONCE = 0.5  # of a teacher's row, on average
TOKENS = {"bert": 30_522, "gpt2": 50_258}  # of the tokenizers that recipes name, GPT-2's with a mask


@dataclass(frozen=True)
class Passes:
    """Of the rows of one step, as shares of its batch: trained (forward and backward), read (forward alone), and mixed,
    whose distributions become embeddings (a product as large as that of the logits).
    """

    trained: float
    read: float = 0.0
    mixed: float = 0.0


def passes(stage: str, o: NoisyMaskFlowOptions) -> Passes:
    """What a step of a stage takes on average (models/flow/losses.py)."""
    if stage == "adapt":  # an eighth of the rows again at s = 0, and of the teacher
        few = 1 / 8 if o.teacher_weight else 0.0
        return Passes(1 + few, read=few)
    if stage == "flow":  # the denoiser on the diagonal, elsewhere two jumps of the average
        jumps = 1 - o.diagonal_share
        return Passes(1, read=o.diagonal_share + 2 * jumps, mixed=jumps)
    followed = o.ode_steps / o.pair_reuse
    return Passes(1, read=followed, mixed=followed)


def forward_flops(shape: Shape, length: int, masked: float) -> float:
    """Of a row: products of the layers, attention, and logits at a share of the positions."""
    layers = 2 * shape.layers * shape.layer * length
    attention = 4 * shape.layers * length**2 * shape.width
    return layers + attention + mixing_flops(shape, masked * length)


def mixing_flops(shape: Shape, positions: float) -> float:
    """Of a product of positions with the embedding table, or with the head."""
    return 2 * shape.table * positions


def step_flops(shape: Shape, length: int, rows: int, work: Passes, masked: float = 1.0) -> float:
    """A backward pass costs two forward passes: gradients of the weights and of what they read."""
    forwards = (3 * work.trained + work.read) * forward_flops(shape, length, masked)
    return rows * (forwards + work.mixed * mixing_flops(shape, masked * length))


def needs(cfg: DictConfig, shape: Shape) -> list[tuple[str, int, float]]:
    """(name, steps, FLOPs of a step) of the teacher and of each stage of the student."""
    length, rows = cfg.data.sequence_length, cfg.data.batch_size * cfg.trainer.accumulate_grad_batches
    options = {name: value for name, value in cfg.module.items() if name != "_target_"}
    o = NoisyMaskFlowOptions(**options)
    stages = Stages(o.stages, STAGES)
    stages.plan(cfg.trainer.max_steps)
    teacher = ("teacher", cfg.teacher.max_steps, step_flops(shape, length, rows, Passes(1), MASKED_AT_ONCE))
    own = [
        (stage.name, stage.last - stage.first, step_flops(shape, length, rows, passes(stage.name, o)))
        for stage in stages.all
    ]
    return [teacher, *own]


def bytes_of(cfg: DictConfig, shape: Shape, copies: int) -> float:
    found = describe_footprint(
        shape.config(), "float32", batch_size=cfg.data.batch_size, length=cfg.data.sequence_length
    )
    return 4 * shape.whole * copies + found.distillation - found.weights


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="+", help="of run.py, such as experiment=flow_lm1b")
    parser.add_argument("--vocab-size", type=int, help="tokens; those of the recipe's tokenizer unless given")
    parser.add_argument("--device", default="H100 or H200 in bfloat16", help="what --peak is of")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s that the maker states, without sparsity")
    parser.add_argument("--utilisation", type=float, default=0.2, help="share of the peak that a training reaches")
    args = parser.parse_args(arguments)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", args.options)
    if "noisy_mask" not in cfg.module.get("_target_", "") or cfg.module.adapter != "full":
        parser.error("only experiments with module=noisy_mask_flow... and module.adapter=full are counted")
    body, tokens = cfg.model, args.vocab_size or TOKENS.get(cfg.data.tokenizer)
    if tokens is None:
        parser.error(f"data.tokenizer={cfg.data.tokenizer} is not one of a recipe; type --vocab-size N")
    shape = Shape(tokens, body.hidden_size, body.intermediate_size, body.num_hidden_layers)
    table = Table(title=f"computed, not measured: {shape.whole:,} parameters, {args.device}")
    for name in ("training", "steps", "TFLOP a step", "GPU hours"):
        table.add_column(name, justify="left" if name == "training" else "right")
    found, total = needs(cfg, shape), 0.0
    for name, steps, flops in found:
        hours = steps * flops / (args.peak * 1e12 * args.utilisation) / 3600
        total += hours
        table.add_row(name, f"{steps:,}", f"{flops / 1e12:.1f}", f"{hours:,.0f}")
    table.add_row("together", f"{sum(steps for _, steps, _ in found):,}", "", f"{total:,.0f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"at {args.utilisation:.0%} of {args.peak:g} TFLOP/s; more or less in proportion", highlight=False)
    teacher, student = (bytes_of(cfg, shape, copies) / GB for copies in (TEACHER_COPIES, STUDENT_COPIES))
    rows = f"{cfg.data.batch_size} rows at once"
    console.print(
        f"memory: about {teacher:.0f} GB for the teacher, {student:.0f} GB for the student ({rows})", highlight=False
    )


if __name__ == "__main__":
    main()
