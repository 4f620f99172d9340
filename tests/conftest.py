"""Small models and corpora that the tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers: their threads would only wait for each other

import pytest
import torch
from helpers.causal import TINY_SHAPE
from helpers.composed import composed
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hypothesis import settings

from datamodules.oracle.datamodule import OracleDataModule
from models.backbones.llada import LladaModel, build_llada

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
settings.register_profile("leap", deadline=None, derandomize=True, database=None)  # no test depends on speed or chance
settings.load_profile("leap")


LONGEST = ("test_ranks", "test_monitor_ranks", "test_tutorial", "test_end_to_end", "test_foreign_folders")


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_llada():
    """A function that builds a two-layer LLaDA with grouped key-value heads; vocabulary 11, mask id 2."""

    def build(vocab_size: int = 11, **options) -> LladaModel:
        model = build_llada(vocab_size=vocab_size, **(TINY_SHAPE | options)).eval()
        for weight in model.parameters():
            if weight.ndim >= 2:  # fresh weights are so small that every text looks alike
                torch.nn.init.normal_(weight, std=0.4)
        return model

    return build


@pytest.fixture
def tiny_oracle():
    """The enumerable corpus with few rows, set up."""
    data = OracleDataModule(size="tiny", train_rows=64, val_rows=16, test_rows=32, batch_size=8, eval_batch_size=16)
    data.setup()
    return data


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """A function that composes a configuration whose outputs and caches lie in tmp_path."""
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()

    def build(*overrides: str):
        places = ["paths.output_dir=out", "paths.cache_dir=cache", f"paths.run_dir={tmp_path}/out/x/run"]
        cfg = composed(*places, *overrides)
        HydraConfig.instance().set_config(cfg)
        return cfg

    yield build
    GlobalHydra.instance().clear()
