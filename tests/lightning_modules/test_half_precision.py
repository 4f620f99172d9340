"""Every method trains in half precision: its losses are those of float32 but for rounding, and are not the very same."""

import pytest
import torch
from helpers.ranks_job import DRAWN, METHODS, TYPES, causal, online, plans
from helpers.trainer import Losses, quiet_trainer

from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from lightning_modules.online_concept import OnlineConceptModule
from models.backbones.code_space import CodeSpace
from models.functional.errors import UsageError


def coded(data, sampler: str) -> OnlineConceptModule:
    options = {"sampler": sampler, "codes": 8, "compression": (2.0, 2.0), "quantisation": (0.5, 1.0)}
    return OnlineConceptModule(
        causal(data, num_hidden_layers=3), split=[1, 1, 1], weights={"text": 1.0}, warmup_steps=0, lr=1e-3, **options
    )


SAMPLERS = ("gumbel_st", "fsq", "ema_vq")
LEVELS = {"types": {"a": {"codes": 4, "levels": 2}}, "planning": {"prior": "sequential", "posterior": "slots"}}
KINDS = {
    **{f"plans, {name}": lambda data, name=name: plans(data, sampler=name, lr=1e-3) for name in SAMPLERS},
    "plans, levels of ema_vq": lambda data: plans(data, sampler="ema_vq", lr=1e-3, **LEVELS),
    **{f"online, {name}": lambda data, name=name: coded(data, name) for name in SAMPLERS},
    "online, states": online,
    **{name: METHODS[name] for name in ("hard_em", "qstar", "noisy_mask", "logit", "step_halving", "latent")},
}
REFUSED = ("noisy_mask", "logit", "step_halving")  # they train in float32
QUICK = ("plans, ema_vq", "plans, gumbel_st", "online, ema_vq", "online, gumbel_st")
CASES = [
    pytest.param(kind, precision, marks=() if kind in QUICK and precision == "bf16-mixed" else pytest.mark.slow)
    for kind in KINDS
    for precision in ("bf16-mixed", "bf16-true")
    if precision == "bf16-mixed" or not (kind in REFUSED or kind.endswith(("vq", "fsq")))
]


@pytest.mark.parametrize(("kind", "precision"), CASES)
def test_losses_are_float32_s_but_for_rounding(tiny_oracle, kind, precision):
    found = []
    for name in ("32-true", precision):
        torch.manual_seed(0)
        losses, module = Losses(), KINDS[kind](tiny_oracle)
        quiet_trainer(2, precision=name, callbacks=[losses], val_check_interval=2).fit(module, tiny_oracle)
        found.append(losses.seen)
    full, half = map(torch.tensor, found)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.01)
    assert not torch.equal(half, full)
    for part in module.modules():
        if isinstance(part, CodeSpace):  # means of points in 16 bits would stand still
            assert all(buffer.dtype == torch.float32 for buffer in part.buffers())


@pytest.mark.parametrize("kind", ["plans, ema_vq", "online, fsq"])
def test_codes_are_not_kept_in_sixteen_bits(tiny_oracle, kind):
    KINDS[kind](tiny_oracle).require_precision("bf16-mixed")
    KINDS[kind.split(",")[0] + ", gumbel_st"](tiny_oracle).require_precision("bf16-true")
    with pytest.raises(UsageError, match=r"codes of fsq and ema_vq lie in float32; type trainer\.precision=bf16-mixed"):
        KINDS[kind](tiny_oracle).require_precision("bf16-true")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_plans_add_to_a_bfloat16_model_is_float32(tiny_oracle, sampler):
    """A base as pretrained models are stored: it trains and is tested, with the losses of float32 but for rounding."""
    weights = dict.fromkeys(("text", "planner", "posterior", "usage", "bag", "rate", "commitment"), 0.1) | {"text": 1.0}
    options = {"types": TYPES, "weights": weights, "warmup_steps": 0, "lr": 1e-3, **DRAWN, "sampler": sampler}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        losses, module = Losses(), ConceptPlannerExecutorModule(causal(tiny_oracle).to(dtype), **options)
        trainer = quiet_trainer(2, callbacks=[losses], val_check_interval=2)
        trainer.fit(module, tiny_oracle)
        found.append(losses.seen)
    trainer.test(module, tiny_oracle, verbose=False)
    dtypes = {name.startswith("model.backbone."): p.dtype for name, p in module.named_parameters()}
    assert dtypes == {True: torch.bfloat16, False: torch.float32}
    full, half = map(torch.tensor, found)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.01)
    assert not torch.equal(half, full)
