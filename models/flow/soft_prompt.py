"""The trainable part of a student: prefix keys and values for every layer, as a function of the interval (r, t).

Legend: B batch, H key-value heads, K prompt length, d head width.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from models.backbones.llada import Prefix, prefix_heads


def sinusoidal_embedding(time: Tensor, width: int, max_frequency: float = 4.0) -> Tensor:
    """(B,) times in [0, 1] -> (B, width): sines and cosines of 1 to `max_frequency` radians per unit of time.

    With the usual 1000 radians d/dt of the embedding, and with it du/dt, could be 1000 times the embedding itself.
    """
    steps = torch.arange(width // 2, device=time.device, dtype=time.dtype) / (width // 2)
    angles = time.unsqueeze(-1) * max_frequency**steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SoftPrompt(nn.Module):
    """(r, t) -> time embedding -> MLP -> prefix K/V of shape (layers, 2, H, K, d) for each row, and a gate per head.

    The MLP's last layer would hold hidden x (layers·2·H·K·d) weights (1.07 B at LLaDA-8B); it is a product of rank `rank`.
    The gate starts at 0, where the student is exactly its frozen base. `project_weights` keeps it >= 0 after each step.
    """

    def __init__(
        self, config: PreTrainedConfig, *, prompt_length: int = 16, hidden_size: int = 256, rank: int = 32
    ) -> None:
        super().__init__()
        self.prompt_length, self.hidden_size, self.rank = prompt_length, hidden_size, rank
        heads, width = prefix_heads(config)
        self.shape = (config.num_hidden_layers, 2, heads, prompt_length, width)
        self.time_mlp = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size), nn.SiLU()
        )
        self.low_rank = nn.Linear(hidden_size, rank, bias=False)
        self.head = nn.Linear(rank, math.prod(self.shape))
        bias = torch.randn(self.shape)
        bias[:, 0] *= 0.1  # keys: scores near 0, so that an opening gate takes little mass at first
        self.head.bias.data = bias.flatten()
        self.gate = nn.Parameter(torch.zeros(config.num_hidden_layers, config.num_attention_heads))

    def forward(self, r: Tensor, t: Tensor) -> Prefix:
        """r, t (B,) with 0 <= r <= t <= 1 -> Prefix for B rows."""
        times = [sinusoidal_embedding(time, self.hidden_size) for time in (r, t - r)]
        flat = self.head(self.low_rank(self.time_mlp(torch.cat(times, dim=-1))))
        layers, two, heads, length, width = self.shape
        keys, values = flat.view(-1, layers, two, heads, length, width).permute(2, 1, 0, 3, 4, 5)
        return Prefix(keys, values, self.gate.clamp(min=0.0))

    @torch.no_grad()
    def project_weights(self) -> None:
        """Set gates that a step made negative to 0: softmax mass cannot be negative."""
        self.gate.clamp_(min=0.0)
