"""Small models and corpora that the tests share."""

import pytest
import torch

from datamodules.oracle.datamodule import OracleDataModule
from models.backbones.llada import LladaModel, build_llada

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_llada():
    """A function that builds a two-layer LLaDA with grouped key-value heads; vocabulary 11, mask id 2."""

    def build(vocab_size: int = 11, **options) -> LladaModel:
        shape = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
            "rope_theta": 10_000.0,
            "mask_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        model = build_llada(vocab_size=vocab_size, **(shape | options)).eval()
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
