"""Short trainings of every method; writes what came of each.

ranks_job.py one|ddp|fsdp|apart FOLDER [apart:]METHOD[@PRECISION][=CHECKPOINT]...

`one` is a process that takes the two halves of a batch one after the other, each with the draws of the rank that would have it,
or the batch whole where what it learns of is all rows of a step (WHOLE); `apart` are two ranks that keep their gradients for
themselves, of all methods or of those named so.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from callbacks.ema import TrainableEMA
from callbacks.flow_monitor import FlowMonitor
from callbacks.monitors.gradient import GradientMonitor
from callbacks.plan_probe import PlanProbe
from datamodules.oracle.datamodule import OracleDataModule
from datamodules.packed_text import PackedTextDataModule
from helpers.causal import TINY_SHAPE, tiny_causal
from helpers.concept import DRAWN
from helpers.trainer import quiet_trainer
from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from lightning_modules.logit_flow import LogitFlowModule
from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule
from lightning_modules.online_concept import OnlineConceptModule
from lightning_modules.pretrain import PretrainModule
from lightning_modules.qstar_decoding import QStarDecodingModule
from lightning_modules.step_halving import StepHalvingModule
from lightning_modules.training.sharding import ShardedStrategy
from models.backbones.causal_lm import with_adapters
from models.backbones.llada import build_llada
from models.diffusion.objective import MaskedDiffusion
from models.flow.denoiser_objective import ContinuousDiffusion
from models.functional.weights import full_tensor, trainable_weights
from models.objectives.latent import Latent
from models.objectives.masked_lm import MaskedLM
from models.objectives.multi_token import MultiToken
from models.objectives.next_token import NextToken
from models.objectives.span_corruption import SpanCorruption

RANKS, ROWS, STEPS = 2, 8, 6
STAGES = {name: {"share": 1 / 3, "lr": 1e-2} for name in ("adapt", "flow", "polish")}
SMALL = {"prompt_length": 3, "prompt_hidden_size": 8, "prompt_rank": 4}
# of the flow and of the planner's gradient; other monitors log a rank's own
WATCHED = (
    "noise_information",
    "distinct",
    "entropy_of_all",
    "accuracy_at",
    "denoiser_gap",
    "consistency_gap",
    "planner_gradient",
)
WHOLE = ("online_codes",)  # no draws of a rank's own, and as many tokens in every row
TYPES = {"a": {"codes": 3}, "b": {"codes": 4}}
ENDING = {"a": {"codes": 3}, "b": {"codes": 4, "most": 3, "least": 0}}


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that every text counts."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.4, generator=generator)
    return model


def teacher(data: Any) -> torch.nn.Module:
    ids = data.special_ids()
    return stirred(build_llada(**(TINY_SHAPE | {name: value for name, value in ids.items() if value is not None})))


def causal(data: Any, **options: Any) -> torch.nn.Module:
    ids = data.special_ids()
    return tiny_causal(ids.pop("vocab_size"), **(ids | options))


def noisy_mask(data: Any, **options: Any) -> LightningModule:
    # a rank averages over texts of its own, and the one process would mix both
    settings = {"stages": STAGES, "ode_steps": 4, "pair_reuse": 2, "recent_texts": 0, **SMALL}
    return NoisyMaskFlowModule(teacher(data), **(settings | options))


def qstar(data: Any, **options: Any) -> LightningModule:
    theta, target = causal(data), stirred(causal(data))
    return QStarDecodingModule(theta, target, exactness_samples=0, lr=1e-2, warmup_steps=0, **options)


def online(data: Any) -> LightningModule:
    """A multiplier of the rate follows the commits of all ranks."""
    weights = {"text": 1.0, "ratio": 0.1, "usage": 0.1}
    options = {"codes": 8, "compression": (2.0, 2.0), "rate_control": "multiplier", "warmup_steps": 0, "lr": 1e-2}
    return OnlineConceptModule(causal(data, num_hidden_layers=3), split=[1, 1, 1], weights=weights, **options)


def online_codes(data: Any) -> LightningModule:
    """Codes follow the points of all ranks, and an offset the commits of all ranks."""
    options = {"codes": 8, "sampler": "ema_vq", "code_decay": 0.9, "quantisation": (1.0, 1.0), "noise": (0.0, 0.0)}
    options |= {"compression": (2.0, 2.0), "weights": {"text": 1.0}, "warmup_steps": 0, "lr": 1e-2}
    return OnlineConceptModule(causal(data, num_hidden_layers=3), split=[1, 1, 1], **options)


def plans(data: Any, **options: Any) -> LightningModule:
    weights = {"text": 1.0, "planner": 1.0, "posterior": 1.0, "usage": 0.1}
    options = {"types": TYPES, "weights": weights, "warmup_steps": 0, "lr": 1e-2, **DRAWN, **options}
    return ConceptPlannerExecutorModule(causal(data), **options)


def plans_with_quota(data: Any) -> LightningModule:
    """A multiplier of the quota follows the plans of all ranks."""
    weights = {"text": 1.0, "planner": 1.0, "usage": 0.1, "quota": 0.3}
    return plans(data, types=ENDING, weights=weights, quota=1.5, quota_gain=0.5)


def pretrained(model: torch.nn.Module, objective: Any, **options: Any) -> LightningModule:
    return PretrainModule(model, objective, lr=1e-2, warmup_steps=0, **options)


METHODS = {
    "noisy_mask": noisy_mask,
    "noisy_mask_jvp": lambda data: noisy_mask(data, adapter="lora", target="meanflow"),
    "noisy_mask_lora": lambda data: noisy_mask(data, adapter="lora", target="psd"),
    "logit": lambda data: LogitFlowModule(teacher(data), lr=1e-2, warmup_steps=0, **SMALL),
    "step_halving": lambda data: StepHalvingModule(teacher(data), start_forwards=4, lr=1e-2),
    "masked_diffusion": lambda data: pretrained(teacher(data), MaskedDiffusion()),
    "masked_diffusion_muon": lambda data: pretrained(teacher(data), MaskedDiffusion(), optimizer="muon"),
    "next_token_packed": lambda data: pretrained(causal(data), NextToken()),
    "next_token_lora": lambda data: pretrained(with_adapters(causal(data), 2), NextToken()),
    "latent": lambda data: pretrained(causal(data), Latent(span=2)),
    "multi_token": lambda data: pretrained(causal(data), MultiToken(2)),
    "masked_lm": lambda data: pretrained(teacher(data), MaskedLM()),
    "span_corruption": lambda data: pretrained(causal(data), SpanCorruption()),
    # one entry of a matrix has a gradient of 2e-8, of whose rounding AdamW would make a step: Muon's are of whole matrices
    "continuous_diffusion": lambda data: pretrained(teacher(data), ContinuousDiffusion(), optimizer="muon"),
    "plans": plans_with_quota,
    "plans_parallel": lambda data: plans(data, executor="parallel", search={"begin": 0.5, "candidates": 3}),
    "hard_em": lambda data: plans(data, search={"begin": 0.34, "candidates": 3}),
    "online": online,
    "online_codes": online_codes,
    "qstar": qstar,
    "qstar_lora": lambda data: qstar(data, lora_rank=2),
}


def corpus(method: str, folder: Path) -> Any:
    if method not in ("next_token_packed", "online_codes"):
        data = OracleDataModule(
            size="tiny", style=0.5, train_rows=64, val_rows=16, test_rows=8, batch_size=ROWS, eval_batch_size=ROWS
        )
        data.setup()
        return data
    for name, lines in (("train", 60), ("val", 20)):
        (folder / f"{name}.txt").write_text("".join(f"{name} {k} is {k * k} long\n" for k in range(lines)))
    data = PackedTextDataModule(
        name="ranks", train=f"{folder}/train.txt", val=f"{folder}/val.txt", test=f"{folder}/val.txt", cut="line",
        tokenizer="byte", vocab_size=0, sequence_length=24, batch_size=ROWS, eval_batch_size=ROWS, cache_dir=f"{folder}/cache",
        document_mask=method == "next_token_packed",
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    return data


def share_out(data: Any, ranks: bool, whole: bool) -> Any:
    """The corpus, of whose batches every rank gets its rows, or one process the rows of each rank in turn, or all of them."""

    def halves(batches: list) -> DataLoader:
        if whole and not ranks:
            return DataLoader(batches, batch_size=None)
        each = [torch.distributed.get_rank()] if ranks else range(RANKS)
        return DataLoader(
            [{name: c[k::RANKS] for name, c in batch.items()} for batch in batches for k in each], batch_size=None
        )

    # whole batches, laid out before there are ranks
    train = [batch for _, batch in zip(range(STEPS), data.train_dataloader(), strict=False)]
    val = [batch for batch in data.val_dataloader() if len(batch["input_ids"]) == ROWS]
    data.train_dataloader, data.val_dataloader = (lambda: halves(train)), (lambda: halves(val))
    return data


class PairsOfHalves:
    """A pool of pairs for each half."""

    def __init__(self, module: Any) -> None:
        self.module, self.pools = module, [copy.deepcopy(module.pairs) for _ in range(RANKS)]

    def draw(self, *arguments: Any) -> Any:
        return self.pools[self.module.half].draw(*arguments)

    def state_dict(self) -> dict[str, Any]:
        return {}


def in_halves(module: LightningModule) -> LightningModule:
    """The module, whose k-th batch is drawn for as rank k % RANKS draws for its own."""

    class Halves(type(module)):
        half = 0
        global_rank = property(lambda self: self.half)

        def step_generator(self, batch_idx: int, stream: int = 0, epoch: int | None = None) -> torch.Generator:
            self.half = batch_idx % RANKS
            return super().step_generator(batch_idx // RANKS, stream, epoch)

    module.__class__ = Halves
    if hasattr(module, "pairs"):
        module.pairs = PairsOfHalves(module)
    return module


class Noted(Callback):
    """Losses of every rank, the gradient of each step as the optimiser sees it, and the share of the weights that is split.

    held: the memory of split weights on this rank, in units of what all of them take.
    """

    def __init__(self, whole: bool) -> None:
        self.whole, self.losses = whole, []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.split = self.held = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(*_: Any) -> None:
            named = trainable_weights(pl_module)
            self.gradients.append({n: full_tensor(p.grad).clone() for n, p in named.items() if p.grad is not None})

        sizes = [(p.numel(), isinstance(p, DTensor)) for p in pl_module.parameters()]
        self.split = sum(size for size, split in sizes if split) / sum(size for size, _ in sizes)
        shares = [p for p in pl_module.parameters() if isinstance(p, DTensor)]
        held = sum(p.to_local().untyped_storage().nbytes() for p in shares)
        self.held = held / max(1, sum(p.numel() * p.element_size() for p in shares))
        trainer.optimizers[0].register_step_post_hook(note)  # a step computes its gradients itself

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        own = trainer.callback_metrics["train/loss"].detach()  # before it is weighted for its share of a step
        own = pl_module.all_gather(own).flatten()
        self.losses += [own.mean().item()] if self.whole else own.tolist()


class Apart(Callback):
    """Ranks that do not speak of their gradients."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.model.require_backward_grad_sync = False


def train(kind: str, method: str, data: Any, folder: Path, resume: str | None) -> None:
    torch.manual_seed(0)
    name, (method, _, precision) = method, method.partition("@")
    module = METHODS[method](data)
    parts = RANKS if kind == "one" and method not in WHOLE else 1
    if parts > 1:
        module = in_halves(module)
    noted, probe = Noted(method in WHOLE), PlanProbe(rows=20)
    watching = [TrainableEMA(0.9)] if method in ("masked_diffusion", "next_token_lora", "plans", "qstar") else []
    watching += [FlowMonitor(prompts=2, noises=4, rows=4)] if method == "noisy_mask" else []
    watching += [probe] if method == "masked_diffusion" else []
    watching += [GradientMonitor()] if method == "plans" else []
    keep = ModelCheckpoint(folder / f"{kind}-{name}", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    strategies = {"one": "auto", "ddp": "ddp", "apart": "ddp", "fsdp": ShardedStrategy()}
    trainer = quiet_trainer(
        STEPS, devices=1 if kind == "one" else RANKS, strategy=strategies[kind], enable_checkpointing=True,
        accumulate_grad_batches=parts, gradient_clip_val=1.0, val_check_interval=STEPS * parts, precision=precision or None,
        callbacks=[*watching, noted, keep, *([Apart()] if kind == "apart" else [])],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    if trainer.is_global_zero:
        weights = {name: p.detach() for name, p in module.named_parameters()}
        weights |= {name: buffer.float() for name, buffer in module.named_buffers()}
        watched = ("val/", *(f"monitor/{name}" for name in WATCHED))
        figures = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith(watched)}
        found = {"losses": noted.losses, "gradients": noted.gradients, "weights": weights, "figures": figures}
        found |= {"split": noted.split, "held": noted.held}
        found["figures"] |= {"probe": probe.untrained} if probe.untrained is not None else {}
        torch.save(found, folder / f"{kind}-{name}.pt")


def main(kind: str, folder: str, *methods: str) -> None:
    torch.set_num_threads(1)
    wanted = dict(method.split("=", 1) if "=" in method else (method, None) for method in methods)
    ranks, plain = kind != "one", {method: method.split(":")[-1].partition("@")[0] for method in wanted}
    data = {method: share_out(corpus(name, Path(folder)), ranks, name in WHOLE) for method, name in plain.items()}
    for method, resume in wanted.items():
        own, _, name = method.rpartition(":")
        train(own or kind, name, data[method], Path(folder), resume)
    if dist.is_initialized():
        dist.destroy_process_group()  # torch 2.11 may otherwise wait for ever when the interpreter exits


if __name__ == "__main__":
    main(*sys.argv[1:])
