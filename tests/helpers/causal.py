"""A causal model so small that its probabilities can be worked out by hand, in the manner of a transformers model."""

from types import SimpleNamespace

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from datamodules.batch import pack_prompt_response
from models.backbones.causal import build_causal

PAD, EOS, MASK = 0, 1, 2
TINY_SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rope_theta": 10_000.0,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


class RunningMean(nn.Module):
    """State of a position: the tanh of the mean embedding of the positions that it may see."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_) -> SimpleNamespace:
        length = input_ids.shape[1]
        if attention_mask is not None and attention_mask.ndim == 4:
            sees = (attention_mask[:, 0] == 0).to(self.table.weight.dtype)
        else:
            sees = torch.ones(length, length).tril().to(self.table.weight.dtype).expand(len(input_ids), -1, -1)
            if attention_mask is not None:
                sees = sees * attention_mask.unsqueeze(1)
        mean = sees @ self.table(input_ids) / sees.sum(-1, keepdim=True).clamp(min=1)
        return SimpleNamespace(last_hidden_state=torch.tanh(mean))


class ToyCausal(nn.Module):
    def __init__(self, vocab_size: int = 7, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = RunningMean(vocab_size, width), nn.Linear(width, vocab_size, bias=False)
        self.config = SimpleNamespace(mask_token_id=MASK, to_dict=lambda: {"mask_token_id": MASK})
        self.double()

    def get_decoder(self) -> nn.Module:
        return self.body

    def get_input_embeddings(self) -> nn.Module:
        return self.body.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **arguments) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body(input_ids, **arguments).last_hidden_state))


class ToyFiller(nn.Module):
    """The same, looking both ways, in the manner of LLaDA."""

    mask_id = MASK

    def __init__(self, vocab_size: int = 7, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.mix = nn.Embedding(vocab_size, width), nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.double()

    @property
    def embedding(self) -> Tensor:
        return self.table.weight

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)

    def hidden(self, inputs_embeds: Tensor, attention_mask: Tensor, response_mask: Tensor | None = None) -> Tensor:
        keep = attention_mask.to(inputs_embeds.dtype).unsqueeze(-1)
        mean = (inputs_embeds * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
        place = torch.arange(inputs_embeds.shape[1], dtype=inputs_embeds.dtype).view(1, -1, 1) / 10
        return torch.tanh(inputs_embeds + self.mix(mean) + place)


def tiny_causal(vocab_size: int = 11, **options) -> PreTrainedModel:
    """A two-layer causal model whose weights are large enough that texts differ; mask 2, end 1, padding 0."""
    model = build_causal(vocab_size=vocab_size, **(TINY_SHAPE | options)).eval()
    for weight in model.parameters():
        if weight.ndim >= 2:
            nn.init.normal_(weight, std=0.4)
    return model


def packed_batch(rows: int = 2, length: int = 6, vocab_size: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Rows of one stream: labels are the ids one further; every token stands for 1 to 3 bytes, id 1 for none."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(3, vocab_size, (rows * length + 1,), generator=generator)
    stream[::5] = EOS
    columns = {
        "input_ids": stream[:-1],
        "labels": stream[1:],
        "target_bytes": (stream[1:] != EOS) * (stream[1:] % 3 + 1),
    }
    return {name: column.view(rows, length).clone() for name, column in columns.items()}


def pair_batch() -> dict[str, Tensor]:
    """Prompts of 0 to 3 tokens before 3 columns, responses of 4 columns."""
    prompts, responses = [[3, 4, 5], [], [6]], [[4, 5], [6, 3, 4, 5], [3]]
    return pack_prompt_response(prompts, responses, prompt_length=3, response_length=4, pad_id=PAD, eos_id=EOS)


class PackedStream(LightningDataModule):
    """Packed rows in the shape that a text corpus hands out, without one: batches of ragged sizes."""

    name, response_length = "packed", 1

    def __init__(self, sizes: tuple[int, ...] = (3, 1, 2), vocab_size: int = 7, documents: bool = False) -> None:
        super().__init__()
        self.batches = [packed_batch(rows, vocab_size=vocab_size, seed=rows) for rows in sizes]
        if documents:
            for batch in self.batches:
                place = torch.arange(6).expand_as(batch["input_ids"])
                batch |= {"document_ids": place // 4, "position_ids": place % 4}

    def facts(self) -> dict:
        return {"name": self.name, "entropy_nats_per_token": None, "conditional_total_correlation": None}

    def controls(self) -> list:
        return []

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader
