"""Where the processor time of a whole job goes: seconds of each part, without the parts inside it.

python benchmarks/job_parts.py --threads 1 --clock cpu experiment=meanflow_llada
"""

import functools
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from timing import CLOCKS, Row, build_result, new_parser, prepare, show, write_json

from app import modes
from callbacks.flow_monitor import FlowMonitor
from callbacks.frontier import FrontierReport
from callbacks.monitors.rows import RowMonitor
from lightning_modules import base, noisy_mask_flow, staged_distill
from lightning_modules.pretrain import PretrainModule
from lightning_modules.training import decoder_cost
from lightning_modules.training.optimizers import Muon
from models.flow.endpoint_pairs import EndpointPairs
from models.flow.path import NoisyMaskPath
from reporting.console import report_console

ROOT = Path(__file__).parent.parent

READING = """
the job runs once, as run.py would run it with these options. A part's seconds are its own: those of parts inside it are
counted there. *share*: of the whole. The libraries are imported before the clock starts.
"""


class Parts:
    """Seconds of nested calls, each without the calls inside it; `stage` is what is being trained."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.stage = clock, ""
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inside: list[float] = []

    def timed(self, run: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        """`run`, whose seconds count for the part that `name` gives for its arguments."""

        @functools.wraps(run)
        def counted(*args: Any, **options: Any) -> Any:
            part = name(*args, **options)
            self._inside.append(0.0)
            start = self.clock()
            try:
                return run(*args, **options)
            finally:
                took = self.clock() - start
                self.seconds[part] += took - self._inside.pop()
                self.calls[part] += 1
                if self._inside:
                    self._inside[-1] += took

        return counted

    def staged(self, stage: str, what: str) -> str:
        self.stage = stage
        return f"{stage}: {what}"

    def rows(self) -> list[Row]:
        whole = sum(self.seconds.values())
        parts = sorted(self.seconds.items(), key=lambda part: -part[1])
        return [{"name": n, "seconds": s, "share": s / whole, "calls": self.calls[n]} for n, s in parts]


def watched(parts: Parts) -> list[tuple[Any, str, Callable[..., str]]]:
    """What is timed: where a function stands, its name, and a function of its arguments that gives the part's name."""
    student = noisy_mask_flow.NoisyMaskFlowModule
    return [
        (student, "stage_terms", lambda _, stage, *a: parts.staged(stage, "forward")),
        (PretrainModule, "training_step", lambda *_, **k: parts.staged("teacher", "forward")),
        (torch.Tensor, "backward", lambda *_, **k: f"{parts.stage}: backward"),
        (torch.optim.AdamW, "step", lambda *_, **k: "optimizer: AdamW"),  # its closure is counted for itself
        (Muon, "step", lambda *_, **k: "optimizer: Muon"),
        (staged_distill, "update_average", lambda *_, **k: "running average"),
        (EndpointPairs, "_make", lambda *_, **k: "polish: making pairs"),
        (NoisyMaskPath, "token_posterior", lambda *_, **k: "adapt: targets over recent texts"),
        (student, "validation_step", lambda *_, **k: "validation"),
        (PretrainModule, "validation_step", lambda *_, **k: "validation"),
        (FlowMonitor, "on_validation_epoch_end", lambda *_, **k: "monitors"),
        (RowMonitor, "on_validation_epoch_end", lambda *_, **k: "monitors"),
        (Trainer, "save_checkpoint", lambda *_, **k: "checkpoints"),
        (base, "measure_decoder", lambda decoder, *_, **k: f"comparison: {decoder.method}"),
        (decoder_cost, "single_text", lambda *_, **k: "comparison: texts alone, counting FLOPs"),
        (decoder_cost, "flops_per_token", lambda *_, **k: "comparison: texts alone, counting FLOPs"),
        (FrontierReport, "on_test_epoch_end", lambda *_, **k: "comparison: scores and figures"),
        (Trainer, "fit", lambda *_, **k: "rest of the training loops"),
        (Trainer, "test", lambda *_, **k: "comparison: the rest"),
        (modes, "run_mode", lambda *_, **k: "start-up, the rest"),
    ]


@contextmanager
def watch(parts: Parts) -> Iterator[None]:
    """Inside, what is `watched` is timed."""
    before = []
    for owner, name, part in watched(parts):
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, parts.timed(getattr(owner, name), part))
    try:
        yield
    finally:
        for owner, name, original in reversed(before):
            setattr(owner, name, original)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=1)
    args, options = parser.parse_known_args(argv)
    device = prepare(args)
    parts = Parts(CLOCKS[args.clock])
    given, sys.argv = sys.argv, ["run.py", *options]
    try:
        with watch(parts):
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
    finally:
        sys.argv = given
    result = build_result("job_parts", args, device, parts.rows(), READING, job=options)
    columns = {
        "part": lambda row: row["name"],
        "seconds": lambda row: f"{row['seconds']:.1f}",
        "share": lambda row: f"{row['share']:.1%}",
        "calls": lambda row: f"{row['calls']}",
    }
    show(result, columns, report_console())
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
