"""What trainer=fsdp refuses, and averaged gradients by hand; two ranks are in tests/test_ranks_of_methods.py."""

import pytest
import torch
from helpers.causal import tiny_causal
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Trainer

from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from lightning_modules.training import sharding
from lightning_modules.training.sharding import ShardedStrategy, average_gradients
from models.functional.errors import UsageError
from models.functional.weights import distributed_like, full_tensor


def planner(**options):
    return ConceptPlannerExecutorModule(tiny_causal(), types={"a": {"codes": 3}}, weights={"text": 1.0}, **options)


def test_one_process_is_refused_by_name():
    trainer = Trainer(accelerator="cpu", devices=1, strategy=ShardedStrategy(), logger=False)
    with pytest.raises(UsageError, match=r"there is one only; type trainer.devices=2"):
        trainer.strategy.require_several()
    Trainer(accelerator="cpu", devices=2, strategy=ShardedStrategy(), logger=False).strategy.require_several()


def test_a_run_that_would_split_nothing_is_refused_by_name():
    search = {"begin": 0.5}
    with pytest.raises(
        UsageError, match=r"trainer=fsdp would split nothing: .* type module.search=null, or trainer=ddp"
    ):
        planner(search=search, lora_rank=2).require_splittable()
    planner(search=search).require_splittable()
    planner(lora_rank=2, search=None).require_splittable()


def test_the_option_builds_the_strategy(request):
    with initialize_config_dir(str(request.config.rootpath / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"])
    assert isinstance(instantiate(cfg.trainer, callbacks=[], logger=False).strategy, ShardedStrategy)


def test_gradients_are_averaged_and_a_missing_one_is_zero(monkeypatch):
    """Two ranks by hand: the other one holds gradients of 3 and a gradient where this one has none."""

    def with_the_other(x, op=None):
        x.fill_(1) if x.dtype == torch.int32 else x.add_(3.0)

    monkeypatch.setattr(sharding.dist, "all_reduce", with_the_other)
    monkeypatch.setattr(sharding.dist, "get_world_size", lambda: 2)
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[1.0, 5.0]])
    average_gradients(layer)
    assert layer.weight.grad.tolist() == [[2.0, 4.0]]
    assert layer.bias.grad.tolist() == [1.5]


def test_whole_weights_stay_as_they_are():
    weight = torch.ones(2)
    assert full_tensor(weight) is weight
    assert distributed_like(weight, torch.zeros(2)) is weight
