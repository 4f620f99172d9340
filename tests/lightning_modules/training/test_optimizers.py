"""`module.optimizer`: which weights go to which optimiser, and that both are one in schedules and checkpoints."""

from copy import deepcopy

import pytest
import torch
from helpers.noisy_mask import build
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.training import optimizers
from lightning_modules.training.optimizers import CombinedOptimizer, Muon, make_optimizer
from models.functional.errors import UsageError
from models.functional.newton_schulz import orthogonalised

LR, DECAY = 1e-2, 0.1


@pytest.fixture
def weights():
    """A layer's matrix, an embedding, a norm, and a matrix of low rank."""
    torch.manual_seed(0)
    shapes = {"model.layers.0.mlp.weight": (12, 8), "model.embed.weight": (5, 8), "model.layers.0.norm": (8,)}
    shapes["model.layers.0.lora_A.weight"] = (2, 8)
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def gradients(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in weights.values():
        p.grad = torch.randn(p.shape, generator=generator)


def steps(optimizer, schedule, weights, seeds):
    for seed in seeds:
        gradients(weights, seed)
        optimizer.step()
        schedule.step()


def schedule_of(optimizer):
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


def copies(weights):
    return {name: torch.nn.Parameter(p.detach().clone()) for name, p in weights.items()}


def in_single_precision(gradient, coefficients, steps, eps):
    """What torch's Muon does to a matrix in bfloat16."""
    return orthogonalised(gradient.unsqueeze(0)).squeeze(0)


def test_matrices_of_layers_take_muons_steps_and_all_else_adamws(weights, monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", in_single_precision)
    alone, before = copies(weights), copies(weights)
    matrix, *others = alone.values()
    muon = torch.optim.Muon([matrix], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": [p for p in others if p.ndim == 2], "weight_decay": DECAY}]
    adamw = AdamW([*groups, {"params": [others[1]], "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.98))
    both = make_optimizer("muon", weights, lr=LR, weight_decay=DECAY)
    steps(both, schedule_of(both), weights, range(3))
    for optimizer in (muon, adamw):
        steps(optimizer, schedule_of(optimizer), alone, range(3))
    for name, p in weights.items():
        torch.testing.assert_close(p, alone[name], rtol=0, atol=1e-6 if ".mlp." in name else 0.0)
    # control: AdamW alone takes other steps of the matrix, and the same of the rest
    plain = make_optimizer("adamw", before, lr=LR, weight_decay=DECAY)
    assert isinstance(plain, AdamW)
    steps(plain, schedule_of(plain), before, range(3))
    same = [torch.equal(p, before[name]) for name, p in weights.items()]
    assert same == [False, True, True, True]


def test_the_first_step_of_a_matrix_moves_it_about_equally_in_every_direction(weights):
    matrix = next(iter(weights.values()))
    for name, equal in (("muon", True), ("adamw", False)):
        own = copies(weights)
        gradients(own, 0)
        make_optimizer(name, own, lr=LR, weight_decay=0.0).step()
        moved = torch.linalg.svdvals((next(iter(own.values())) - matrix).detach())
        assert (moved.max() / moved.min() < 2) == equal, (name, moved)


def test_matrices_of_one_shape_go_together_and_each_takes_the_step_that_it_takes_alone(monkeypatch):
    monkeypatch.setattr(optimizers, "ENTRIES_AT_ONCE", 100)
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(7)]
    together += [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(3, 3))]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    all_of_them = [Muon(together, lr=LR, weight_decay=DECAY)]
    all_of_them += [Muon([p], lr=LR, weight_decay=DECAY) for p in alone]
    without = together[2].detach().clone()
    for _ in range(2):
        for k, (p, own) in enumerate(zip(together, alone, strict=True)):
            p.grad = None if k == 2 else torch.randn(p.shape)
            own.grad = p.grad
        for optimizer in all_of_them:
            optimizer.step()
    for p, own in zip(together, alone, strict=True):
        torch.testing.assert_close(p, own)
    assert torch.equal(together[2], without)  # no gradient, no step


def test_a_schedule_and_a_checkpoint_reach_both(weights):
    went_on = copies(weights)
    optimizer = make_optimizer("muon", weights, lr=LR, weight_decay=DECAY)
    schedule = schedule_of(optimizer)
    steps(optimizer, schedule, weights, range(2))
    resumed = copies(weights)
    other = make_optimizer("muon", resumed, lr=LR, weight_decay=DECAY)
    later = schedule_of(other)
    forgot = make_optimizer("muon", went_on, lr=LR, weight_decay=DECAY)
    for p, now in zip(went_on.values(), weights.values(), strict=True):
        p.data.copy_(now.data)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    later.load_state_dict(schedule.state_dict())
    steps(optimizer, schedule, weights, range(2, 4))
    steps(other, later, resumed, range(2, 4))
    steps(forgot, schedule_of(forgot), went_on, range(2, 4))
    for name, p in weights.items():
        torch.testing.assert_close(resumed[name], p, rtol=0, atol=0)
        assert not torch.equal(went_on[name], p), name  # without the state
    assert {group["lr"] for group in other.param_groups} == {LR / 5}


def test_what_a_cleared_state_forgets_is_forgotten_by_both(weights):
    optimizer = make_optimizer("muon", weights, lr=LR, weight_decay=0.0)
    steps(optimizer, schedule_of(optimizer), weights, range(2))
    fresh = copies(weights)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = LR
    for kept, own in ((weights, optimizer), (fresh, make_optimizer("muon", fresh, lr=LR, weight_decay=0.0))):
        gradients(kept, 7)
        own.step()
    for name, p in weights.items():
        torch.testing.assert_close(p, fresh[name], rtol=0, atol=0)


def test_a_closure_is_called_once_with_gradients(weights):
    optimizer = make_optimizer("muon", weights, lr=LR, weight_decay=0.0)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in weights.values())
        loss.backward()
        calls.append(loss.item())
        return loss

    first = optimizer.step(closure)
    assert len(calls) == 1
    assert first.item() == calls[0]
    optimizer.step(closure)
    assert calls[1] < calls[0]


def test_a_student_trains_its_layers_with_muon_and_low_rank_ones_with_adamw(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle)
    names = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = make_optimizer("muon", names, lr=LR, weight_decay=0.0)
    assert isinstance(optimizer, CombinedOptimizer)
    of = {id(p): name for name, p in names.items()}
    matrices = {of[id(p)] for p in optimizer.parts[0].param_groups[0]["params"]}
    layer = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in matrices} == layer
    assert len(matrices) == 7 * module.teacher.config.num_hidden_layers
    lora = build(tiny_llada, tiny_oracle, adapter="lora", lora_rank=2)
    names = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    assert isinstance(make_optimizer("muon", names, lr=LR, weight_decay=0.0), AdamW)


def test_an_unknown_optimizer_is_refused(tiny_llada, tiny_oracle):
    with pytest.raises(UsageError, match=r"module\.optimizer.*adamw.*muon"):
        build(tiny_llada, tiny_oracle, optimizer="sgd")
