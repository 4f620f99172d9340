"""A small network that drafts a whole block of tokens in one forward pass, from hidden states of the verifiers.

The states of a few layers are normalised and mixed into one vector a position, which the layers of the drafter attend to as
keys and values beside those of the block itself, as in DFlash (2602.06036). The block begins with the last committed token,
whose states are not known yet; the other positions are one learned vector. Embedding and output head are the verifier's.

How the tokens of a block depend on each other (`Dependence`):
- none: not at all, beyond what the states say (DFlash).
- markov: log ψ_l gets a term of low rank from the token before it (DSpark, github.com/deepseek-ai/DeepSpec).
- noise: position l reads the uniform noise that drew the tokens before it, and attention in the block is causal. The noise that
  draws x_l itself is unseen by ψ_l, so ψ_l is the distribution of x_l, as verification needs it.

With `vocabulary=S` only S frequent tokens are proposed, as in FR-Spec (2502.14856): the head and what follows it shrink, and
verification corrects what is never proposed. Distributions have a last column then, of all other tokens.

Several blocks of one text share what is attended to: G texts then have N / G blocks each, those of a text one after the other.
Legend: N drafts, G texts (N while drafting), k tokens of a block, W positions of a window or of a text, F numbers of all chosen
layers together, D width, V vocabulary, S proposed tokens, C columns of ψ (V, or S + 1), H heads, d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.backbones.causal_lm import output_logits
from models.functional.block_draft import NOISE_BITS, draw_with_noise, noise_bits, noise_that_draws
from models.functional.errors import UsageError, require_at_least, require_choice
from models.functional.precision import at_least_float32
from models.interfaces.scores import BlockProposal, Draws

Dependence = Literal["none", "markov", "noise"]
ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class BlockDrafterOptions:
    """Raises UsageError, naming module.<option>, for values that cannot work.

    draft_length: k, tokens of a draft. window: positions before the last token whose states are read. num_layers: its own.
    dependence: see above. rank: of the term of `markov`, at most the vocabulary.
    vocabulary: S, tokens that are proposed; None proposes all.
    """

    draft_length: int = 8
    window: int = 64
    num_layers: int = 1
    dependence: Dependence = "markov"
    rank: int = 256
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        require_choice("module.dependence", self.dependence, get_args(Dependence))
        require_at_least(
            1, module__draft_length=self.draft_length, module__window=self.window,
            module__num_layers=self.num_layers, module__rank=self.rank,
        )  # fmt: skip
        if self.vocabulary is not None:
            require_at_least(1, module__draft_vocabulary=self.vocabulary)


def early_middle_late(layers: int) -> tuple[int, ...]:
    """The layers of a network whose states are read: a quarter, half, and all of the way."""
    return tuple(sorted({max(1, round(share * layers)) for share in (0.25, 0.5, 1.0)}))


class DrafterLayer(nn.Module):
    """Attention of a block to a context and to itself, then a gated MLP, with norms before both."""

    def __init__(self, width: int, heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (
            nn.Linear(a, b, bias=False) for a, b in ((width, inner), (width, inner), (inner, width))
        )

    def keys_values(self, keys: Tensor, values: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values (G, L, D) by head, (G, H, L, d). turn: cosines and sines (1 or G, L, d) of the positions."""
        keys = self._split(keys)
        return apply_rotary_pos_emb(keys, keys, *turn)[1], self._split(values)

    def forward(
        self, x: Tensor, context: tuple[Tensor, Tensor], turn: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        """x (G, L, D): all blocks of a text; context: keys and values of W positions; visible (G, 1, L, W + L) bool."""
        own = self.norm(x)
        queries = self._split(self.q(own))
        queries = apply_rotary_pos_emb(queries, queries, *turn)[0]
        keys, values = (
            torch.cat([a, b], 2) for a, b in zip(context, self.keys_values(self.k(own), self.v(own), turn), strict=True)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        inner = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(inner)) * self.up(inner))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class BlockDrafter(nn.Module):
    """A `ProposesBlocks` for verifiers {name: causal model}; the last of them lends its embedding and head, which stay frozen.

    vocab_size: ids from there on are never proposed. state_layers: {verifier: layers}; None takes `early_middle_late`.
    """

    def __init__(
        self,
        verifiers: dict[str, nn.Module],
        options: BlockDrafterOptions,
        vocab_size: int,
        state_layers: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.options, self.vocab_size = options, vocab_size
        self.block_length, self.window = options.draft_length, options.window
        configs = {name: model.config.get_text_config() for name, model in verifiers.items()}
        if state_layers is None:
            state_layers = {name: early_middle_late(c.num_hidden_layers) for name, c in configs.items()}
        self.state_layers = {name: tuple(layers) for name, layers in state_layers.items()}
        # 1. what is shared
        self.lender = list(verifiers.values())[-1]
        config = list(configs.values())[-1]
        width, heads = config.hidden_size, config.num_attention_heads
        if width % (2 * heads):
            raise UsageError(
                f"a block drafter needs a width that twice its {heads} heads divide, and the model's is {width}"
            )
        # 2. the context
        self.widths = [configs[name].hidden_size for name, layers in self.state_layers.items() for _ in layers]
        self.eps = getattr(config, "rms_norm_eps", 1e-6)
        self.fuse, self.fuse_norm = nn.Linear(sum(self.widths), width, bias=False), nn.RMSNorm(width, eps=self.eps)
        # 3. the block
        self.rest = nn.Parameter(torch.randn(width) * 0.02)
        inner = getattr(config, "intermediate_size", None) or 4 * width
        self.layers = nn.ModuleList(DrafterLayer(width, heads, inner, self.eps) for _ in range(options.num_layers))
        self.norm = nn.RMSNorm(width, eps=self.eps)
        final = getattr(getattr(self.lender.get_decoder(), "norm", None), "weight", None)
        if isinstance(final, Tensor):  # the head expects states of that scale
            self.norm.weight.data.copy_(final.data)
        # 4. the tokens that are proposed
        words = config.vocab_size  # also those that are padding of the output layer
        self.proposed: Tensor | None
        # the first ones, until `propose_only` chooses them
        self.register_buffer("proposed", None if options.vocabulary is None else torch.arange(options.vocabulary))
        # 5. dependence between the tokens
        if options.dependence == "markov":
            rank = min(options.rank, words)
            outputs = words if self.proposed is None else len(self.proposed)
            self.previous, self.bias = nn.Embedding(words, rank), nn.Linear(rank, outputs, bias=False)
            nn.init.zeros_(self.bias.weight)
        elif options.dependence == "noise":
            self.noise_in = nn.Linear(NOISE_BITS, width, bias=False)
        turn = rotary_tables(self.window + self.block_length, width // heads)
        self.cos, self.sin = (nn.Buffer(part, persistent=False) for part in turn)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What is the drafter's and not the verifier's, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("lender.")}

    def own_tensors(self) -> dict[str, Tensor]:
        """What its files hold: its own parameters, and the tokens that it proposes where it does not propose all."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("lender.")}

    def propose_only(self, tokens: Tensor) -> None:
        """Choose the S tokens (S,) that are proposed, each once."""
        assert self.proposed is not None
        self.proposed.copy_(tokens)

    @property
    def draws_with_noise(self) -> bool:
        """Whether its draws come from uniform numbers, whose outcomes cannot be enumerated."""
        return self.options.dependence == "noise"

    @property
    def parameters_read(self) -> int:
        """Parameters that a forward pass multiplies by: its own, and the head."""
        own = sum(p.numel() for name, p in self.own_parameters().items() if not name.startswith("previous."))
        head = self.lender.get_output_embeddings().weight
        return own + (head.numel() if self.proposed is None else len(self.proposed) * head.shape[1])

    # -- the tokens that are proposed ---------------------------------------------------------------------------------

    def columns_of(self, tokens: Tensor) -> Tensor:
        """The column of ψ of each token (...)."""
        if self.proposed is None:
            return tokens
        columns = self.proposed.new_full((len(self.lender.get_output_embeddings().weight),), len(self.proposed))
        columns[self.proposed] = torch.arange(len(self.proposed), device=columns.device)
        return columns[tokens]

    def in_columns(self, log_q: Tensor) -> Tensor:
        """log-probabilities (..., V) in the columns of ψ (..., C); those of all other tokens are added up in the last."""
        if self.proposed is None:
            return log_q
        chosen = log_q[..., self.proposed]
        # the rest of 1: the sum over all others would take several passes over the vocabulary
        other = (1 - chosen.double().exp().sum(-1, keepdim=True)).clamp(min=0).log()
        return torch.cat([chosen, other.to(chosen)], -1)

    def in_vocabulary(self, logp: Tensor) -> Tensor:
        """log ψ (..., C) as log-probabilities (..., V)."""
        if self.proposed is None:
            return logp
        whole = logp.new_full((*logp.shape[:-1], self.vocab_size), -torch.inf)
        return whole.index_copy_(-1, self.proposed, logp[..., :-1])

    def _turn(self, places: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (..., d) of the rotary embeddings at places (...), all below `positions`."""
        cos, sin = self.cos, self.sin
        if positions > len(cos):  # texts in training may be longer than a window
            cos, sin = (part.to(cos) for part in rotary_tables(positions, cos.shape[-1]))
        return cos[places], sin[places]

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def mix_states(self, states: Tensor) -> Tensor:
        """States (..., F) of the chosen layers as what is attended to, (..., D)."""
        parts = states.to(self.fuse.weight.dtype).split(self.widths, -1)
        return self.fuse_norm(
            self.fuse(torch.cat([F.rms_norm(part, part.shape[-1:], eps=self.eps) for part in parts], -1))
        )

    def project(self, context: Tensor) -> Tensor:
        """Keys and values of context (..., D) in every layer, without positions: (..., 2 D) of each layer in turn."""
        return torch.cat([part for layer in self.layers for part in (layer.k(context), layer.v(context))], -1)

    def read_context(self, projected: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer from those of a window or of a text, (G, W, ...) as `project` gives them."""
        length = projected.shape[1]
        turn = self._turn(torch.arange(length, device=projected.device).unsqueeze(0), length)
        parts = projected.chunk(2 * len(self.layers), -1)
        return [layer.keys_values(*parts[2 * n : 2 * n + 2], turn) for n, layer in enumerate(self.layers)]

    def logits(
        self,
        memory: list[tuple[Tensor, Tensor]],
        read: Tensor,
        last: Tensor,
        noise: Tensor | None = None,
        start: Tensor | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Logits (N, k, C) of blocks after the tokens last (N,), without what depends on the drafted tokens.

        memory: see `read_context`; read (N, W) bool: what a block attends to of it; noise (N, k) of dependence=noise.
        start (N,): the position of each block on the axis of W; None: behind it, at W. only (M,): blocks whose logits (M, k, C)
        are wanted; None are all.
        """
        k, texts = self.block_length, len(memory[0][0])
        with torch.no_grad():
            first = self.lender.get_input_embeddings()(last).to(self.rest.dtype)
        x = torch.cat([first.unsqueeze(1), self.rest.expand(len(last), k - 1, -1)], 1)
        own = torch.ones(k, k, dtype=torch.bool, device=last.device)
        if self.options.dependence == "noise":
            assert noise is not None
            # a position reads the noise of those before it alone
            x = x + F.pad(self.noise_in(noise_bits(noise[:, : k - 1]).to(x.dtype)), (0, 0, 1, 0))
            own = own.tril()
        # all blocks of a text attend at once, each to its window and to itself
        blocks = len(last) // texts
        seen = read.view(texts, blocks, 1, -1).expand(-1, -1, k, -1).flatten(1, 2)
        own = torch.block_diag(*[own] * blocks).expand(texts, -1, -1)
        visible = torch.cat([seen, own], -1).unsqueeze(1)
        place = torch.arange(k, device=last.device) + (read.shape[1] if start is None else start.view(texts, blocks, 1))
        turn = self._turn(place.view(-1, blocks * k), read.shape[1] + k)
        x = x.view(texts, blocks * k, -1)
        for layer, kept in zip(self.layers, memory, strict=True):
            x = layer(x, kept, turn, visible)
        x = x.view(len(last), k, -1)
        x = x if only is None else x[only]
        head = self.lender.get_output_embeddings().weight.dtype
        if self.proposed is None:
            return at_least_float32(output_logits(self.lender, self.norm(x).to(head))[..., : self.vocab_size])
        logits = at_least_float32(output_logits(self.lender, self.norm(x).to(head), self.proposed))
        return F.pad(logits, (0, 1), value=-torch.inf)

    def conditional(self, logits: Tensor, previous: Tensor) -> Tensor:
        """log ψ (..., C) given the tokens before, previous (...)."""
        if self.options.dependence == "markov":
            term = self.bias(self.previous(previous))[..., : self.vocab_size].to(logits.dtype)
            logits = logits + (term if self.proposed is None else F.pad(term, (0, 1)))
        return logits.log_softmax(-1)

    # -- drafting -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propose(
        self,
        states: Tensor,
        read: Tensor,
        last: Tensor,
        size: int,
        draws: Draws,
        shape: Callable[[Tensor], Tensor],
    ) -> BlockProposal:
        """See `ProposesBlocks`."""
        noise = None
        if self.options.dependence == "noise":  # positions beyond the draft are read by none of it
            noise = F.pad(draws.uniform(len(last), size, last), (0, self.block_length - size))
        logits = self.logits(self.read_context(self.project(self.mix_states(states))), read, last, noise)
        tokens: list[Tensor] = []
        logp: list[Tensor] = []
        for k in range(size):
            logp.append(shape(self.conditional(logits[:, k], tokens[-1] if tokens else last)))
            if noise is None:  # of the vocabulary, whose noise a verifier may share
                tokens.append(draws.choose(self.in_vocabulary(logp[-1]).exp()))
            else:
                drawn = draw_with_noise(logp[-1], noise[:, k])
                tokens.append(drawn if self.proposed is None else self.proposed[drawn])
        return BlockProposal(torch.stack(tokens, 1), self.in_vocabulary(torch.stack(logp, 1)))

    # -- training -----------------------------------------------------------------------------------------------------

    def log_probs(
        self,
        projected: Tensor,
        read: Tensor,
        last: Tensor,
        tokens: Tensor,
        fractions: Tensor | None = None,
        shape: Callable[[Tensor], Tensor] = lambda logp: logp,
        start: Tensor | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """log ψ (N, k, C) at every position of given blocks tokens (N, k): what `propose` draws from with the same `shape`.

        projected (G, W, ...): see `project`; read (N, W), last (N,), start, only: see `logits`. fractions (N, k): of
        dependence=noise, where in its interval the noise of each token lies (`noise_that_draws`). shape: as in `propose`.
        """
        memory = self.read_context(projected)
        noise = None
        if self.options.dependence == "noise":
            assert fractions is not None
            noise = self._noise_of(memory, read, last, tokens, fractions, shape, start)
        before = torch.cat([last.unsqueeze(1), tokens[:, :-1]], 1)
        before = before if only is None else before[only]
        return shape(self.conditional(self.logits(memory, read, last, noise, start, only), before))

    @torch.no_grad()
    def _noise_of(
        self,
        memory: list[tuple[Tensor, Tensor]],
        read: Tensor,
        last: Tensor,
        tokens: Tensor,
        fractions: Tensor,
        shape: Callable[[Tensor], Tensor],
        start: Tensor | None = None,
    ) -> Tensor:
        """The noise (N, k) with which the drafter itself would have drawn the tokens, one position after the other."""
        noise = torch.zeros_like(fractions)
        for k in range(self.block_length - 1):  # the last position's is read by none
            logp = shape(self.conditional(self.logits(memory, read, last, noise, start)[:, k], last))
            noise[:, k] = noise_that_draws(logp, self.columns_of(tokens[:, k]), fractions[:, k])
        return noise


def rotary_tables(positions: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (positions, width) of rotary embeddings (Su et al., 2104.09864), in transformers' layout."""
    frequencies = ROPE_BASE ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.arange(positions).float().unsqueeze(-1) * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()
