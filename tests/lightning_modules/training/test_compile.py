"""Compiled, recomputed and half-precision layers train as plain ones do, and what cannot be had is refused by name."""

import pytest
import torch
from helpers.concept import build_planner_executor
from helpers.trainer import Losses, quiet_trainer
from torch.autograd.graph import saved_tensors_hooks

import models.flow.losses as objective
from lightning_modules.logit_flow import LogitFlowModule
from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule
from lightning_modules.pretrain import PretrainModule
from lightning_modules.training.compile import compute_layers, decoder_layers, require_compiler
from models.diffusion.objective import MaskedDiffusion
from models.functional.errors import UsageError
from models.functional.jvp import value_and_jvp
from models.functional.weights import trainable_weights

SMALL = {"prompt_length": 3, "prompt_hidden_size": 8, "prompt_rank": 4}
STAGES = {name: {"share": 1 / 3, "lr": 1e-2} for name in ("adapt", "flow", "polish")}


@pytest.fixture
def build(tiny_llada, tiny_oracle):
    """A module of each kind over the same teacher of one layer."""

    def of_kind(kind: str, **options):
        torch.manual_seed(0)
        ids = tiny_oracle.tokenizer
        special = {name: getattr(ids, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
        teacher = tiny_llada(len(ids), num_hidden_layers=1, **special)
        if kind == "pretrain":
            return PretrainModule(teacher, MaskedDiffusion(), lr=1e-2, warmup_steps=0)
        if kind == "logit":
            return LogitFlowModule(teacher, lr=1e-2, warmup_steps=0, **SMALL, **options)
        return NoisyMaskFlowModule(teacher, stages=STAGES, ode_steps=2, **SMALL, **options)

    return of_kind


def trained(module, data, steps=3, **options):
    """The losses, and the weights that are left."""
    losses = Losses()
    quiet_trainer(steps, callbacks=[losses], **options).fit(module, data)
    return losses.seen, {name: p.detach() for name, p in trainable_weights(module).items()}


def assert_alike(found, expected, tolerance=1e-4):
    # a flow map begins as the identity: the first loss of its stage is a square of rounding
    assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=1e-7)
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=tolerance, atol=tolerance)


COMPILED = [
    ("pretrain", {}),
    pytest.param("noisy_mask", {"target": "psd"}, marks=pytest.mark.slow),
    pytest.param("logit", {"jvp_backend": "finite_difference"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "options"), COMPILED)
def test_compiled_layers_train_as_plain_ones(build, tiny_oracle, kind, options):
    compiled = compute_layers(build(kind, **options), "aot_eager", recompute=False)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = trained(compiled, tiny_oracle)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before  # something was compiled
    assert_alike(found, trained(build(kind, **options), tiny_oracle))


@pytest.mark.slow
def test_inductor_trains_as_no_compiler_does(build, tiny_oracle):
    try:
        require_compiler("inductor")
    except UsageError as error:
        pytest.skip(str(error))
    found = trained(compute_layers(build("pretrain"), "inductor", recompute=False), tiny_oracle)
    assert_alike(found, trained(build("pretrain"), tiny_oracle))


MEANFLOW = {"target": "meanflow"}
FROZEN = {"target": "meanflow", "adapter": "prefix"}


@pytest.mark.parametrize(
    ("kind", "options"), [("pretrain", {}), ("noisy_mask", {"target": "psd"}), ("logit", {}), ("noisy_mask", FROZEN)]
)
def test_recomputed_layers_train_as_kept_ones(build, tiny_oracle, kind, options):
    """Frozen layers are differentiated in forward mode in the last two, and may be recomputed all the same."""
    found = trained(compute_layers(build(kind, **options), None, recompute=True), tiny_oracle)
    assert_alike(found, trained(build(kind, **options), tiny_oracle), tolerance=1e-6)


def test_choosing_concepts_with_a_cache_trains_as_without_recomputation(tiny_oracle):
    """The keys and values of a plan's slots are written once, whichever layers are recomputed."""
    runs = {}
    for recompute in (False, True):
        module = build_planner_executor(tiny_oracle)
        runs[recompute] = trained(compute_layers(module, None, recompute), tiny_oracle)
    assert_alike(runs[True], runs[False], tolerance=1e-6)


def test_recomputed_layers_keep_less(build, tiny_oracle):
    def kept(module) -> int:
        batch, sizes = next(iter(tiny_oracle.train_dataloader())), []
        embeds = module.model.embed(batch["input_ids"])
        with saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            module.model.hidden(embeds, batch["attention_mask"])
        return sum(sizes)

    assert kept(compute_layers(build("pretrain"), None, recompute=True)) < kept(build("pretrain")) / 3


def test_layers_are_recomputed_once_however_often_it_is_asked_for(build):
    module = compute_layers(build("pretrain"), None, recompute=True)
    first = [layer.forward for layer in decoder_layers(module)]
    assert [layer.forward for layer in decoder_layers(compute_layers(module, None, recompute=True))] == first


@pytest.mark.parametrize(
    ("kind", "options", "asked", "message"),
    [
        ("logit", {}, ("aot_eager", False), "compile=aot_eager: forward-mode.*module.jvp_backend=finite_difference"),
        ("noisy_mask", MEANFLOW, (None, True), "recompute=true: forward-mode.*module.target=psd, or recompute=false"),
        ("noisy_mask", MEANFLOW, ("inductor", False), "compile=inductor: .*module.target=psd, or compile=null"),
        ("noisy_mask", {}, ("fast", False), "compile=fast is not known; type one of inductor"),
        ("pretrain", {}, ("fast", False), "compile=fast is not known; type one of inductor"),
    ],
)
def test_what_cannot_be_computed_is_refused(build, kind, options, asked, message):
    with pytest.raises(UsageError, match=message):
        compute_layers(build(kind, **options), *asked)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="needs a C\\+\\+ compiler, and no-such-compiler is not there"):
        require_compiler("inductor")
    require_compiler("aot_eager")


# -- half precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("noisy_mask", {"target": "meanflow"}), ("noisy_mask", {"adapter": "lora"}), ("logit", {}), ("pretrain", {})],
)
def test_mixed_precision_stays_near_full_precision(build, tiny_oracle, kind, options):
    full = trained(build(kind, **options), tiny_oracle)
    module = build(kind, **options)
    mixed = trained(module, tiny_oracle, precision="bf16-mixed")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert mixed[0][0] == pytest.approx(full[0][0], rel=0.02, abs=0.02)
    assert mixed[0][0] != full[0][0]  # something was half precision


def test_derivatives_are_full_precision_in_a_mixed_run(build, tiny_oracle, monkeypatch):
    seen = []

    def watched(fn, primals, tangents, **options):
        value, derivative = value_and_jvp(fn, primals, tangents, **options)
        again = value_and_jvp(fn, tuple(x.float() for x in primals), tangents, **options)[1]
        outside = fn(*primals)  # as the rest of the step is computed
        seen.append((value, derivative, again, outside))
        return value, derivative

    monkeypatch.setattr(objective, "value_and_jvp", watched)
    options = {"target": "meanflow", "diagonal_share": 0.0, "endpoint_share": 0.0, "meanflow_until": 0.99}
    trained(build("noisy_mask", **options), tiny_oracle, precision="bf16-mixed")
    assert seen
    for value, derivative, again, outside in seen:
        assert value.dtype == derivative.dtype == torch.float32
        torch.testing.assert_close(derivative, again)
        assert (outside - value).abs().max() > 1e-4  # half precision rounds there, and not in the derivative


def test_half_precision_weights_train_what_is_no_student(build, tiny_oracle):
    full = trained(build("pretrain"), tiny_oracle)
    module = build("pretrain")
    half = trained(module, tiny_oracle, precision="bf16-true")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert half[0][0] == pytest.approx(full[0][0], rel=0.02)
    with pytest.raises(
        UsageError, match=r"bf16-true: what trains of a student is float32; type trainer.precision=bf16"
    ):
        trained(build("logit"), tiny_oracle, precision="bf16-true")
