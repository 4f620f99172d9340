"""A pretrained causal LM as a network that fills masks: its prompt stays causal, its response sees itself.

The state before a position still predicts the position's token, as in pretraining (Gong et al., DiffuLLaMA, 2410.17891), and
the prompt never sees the response (NBDiff, 2512.06776). Without training it is the causal model wherever no mask is seen.
Legend: B batch, L columns, D width, V vocabulary.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from models.backbones import checkpoint_files as files
from models.backbones.abilities import alike, limited_layers, trial
from models.backbones.causal_lm import load_causal, output_logits, save_merged
from models.backbones.dit import DitModel, load_dit
from models.backbones.dit_layout import is_mdlm_config
from models.backbones.dream_layout import config_from_dream, dream_mask_id, is_dream_config
from models.backbones.key_value_cache import cache_argument
from models.backbones.llada import LladaModel, Prefix, load_llada, prefix_heads
from models.functional.attention import positions_from_mask, response_attention, versions_side_by_side
from models.functional.errors import UsageError, require_choice
from models.functional.next_token import before_response
from models.functional.rows import response_columns
from models.functional.vocabulary import choose_mask_token, vocabulary_size

MODEL_TYPE = "leap_masked_from_causal"
CAUSAL, MASK = "causal", "mask.safetensors"  # in its folder: the causal model, and what the mask is embedded as
ATTENTION = "leap_bidirectional"  # registered in `llada`
NEVER = torch.finfo(torch.float32).min / 2  # added to a logit: its probability is 0, and a KL divergence stays finite
MASK_RATE = 3.0  # times the learning rate: so fast is the mask's embedding trained, which begins untrained

Conversion = Literal["causal_prompt", "bidirectional"]
Separator = Literal["response", "prompt"]


@dataclass(frozen=True)
class FromCausalOptions:
    """mask_token_id: the id that stands for a mask. vocab_size: ids from there on are padding of the output layer.

    conversion: `causal_prompt`, or `bidirectional`, in which the prompt sees the response too (a control).
    separator: the last prompt token, whose state predicts the first token of the response, sees the `response` or only the
        `prompt`. With `prompt` the first token is predicted as the causal model predicts it, whatever else is known.
    """

    mask_token_id: int
    vocab_size: int
    conversion: Conversion = "causal_prompt"
    separator: Separator = "response"

    def __post_init__(self) -> None:
        require_choice("model.conversion", self.conversion, get_args(Conversion))
        require_choice("model.separator", self.separator, get_args(Separator))


class MaskedFromCausal(nn.Module):
    """A masked diffusion LM on the weights of a causal one, with the interface of `LladaModel`.

    causal: a model of transformers, with or without adapters of peft; what trains in it, trains here.
    block_length: a response position sees its own block of so many positions and those before it. None: all of the response.
        With 1 the network is the causal model.
    The mask's embedding is a weight of its own in float32. It starts as the mean of the table, at the median length of its
    rows. `mask_change` times `MASK_RATE` is what training adds: its optimiser steps are so much longer.
    """

    def __init__(self, causal: PreTrainedModel | PeftModel, options: FromCausalOptions) -> None:
        super().__init__()
        self.causal, self.options = causal, options
        self.block_length: int | None = None
        self.usual_attention = causal.config._attn_implementation
        self._attend_with(ATTENTION)
        table = causal.get_input_embeddings().weight.detach().float()[: options.vocab_size]
        mean = table.mean(0)
        self.register_buffer("mask_start", mean * table.norm(dim=-1).median() / mean.norm(), persistent=False)
        self.mask_change = nn.Parameter(torch.zeros_like(mean))
        allowed = torch.zeros(causal.config.get_text_config().vocab_size, device=table.device)
        allowed[options.vocab_size :] = NEVER
        allowed[options.mask_token_id] = NEVER
        self.register_buffer("allowed", allowed, persistent=False)

    mask_start: Tensor
    allowed: Tensor

    # -- what users of LladaModel read ----------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.causal.config

    @property
    def device(self) -> torch.device:
        return self.mask_change.device

    @property
    def mask_id(self) -> int:
        return self.options.mask_token_id

    @property
    def mask_embedding(self) -> Tensor:
        """(D,) float32"""
        return self.mask_start + MASK_RATE * self.mask_change

    @property
    def embedding(self) -> Tensor:
        """(V, D): the table of the causal model with the mask's own row."""
        table = self.causal.get_input_embeddings().weight
        row = torch.tensor([self.mask_id], device=table.device)
        return table.index_copy(0, row, self.mask_embedding.to(table.dtype).unsqueeze(0))

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)"""
        embeds = self.causal.get_input_embeddings()(input_ids)
        masked = (input_ids == self.mask_id).unsqueeze(-1)
        return torch.where(masked, self.mask_embedding.to(embeds.dtype), embeds)

    def hidden(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        prefix: Prefix | None = None,
        response_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D), (B, L) bool -> (B, L, D) after the last norm, of the position before each: what predicts its token.

        response_mask (B, L) bool: which columns are of the response. Errors: UsageError without it.
        """
        if response_mask is None:
            raise UsageError("model=from_causal needs prompts with responses; type data=pairs")
        mask, positions = self._layout(attention_mask, response_mask)
        more = {} if prefix is None else {"prefix": prefix}
        states = self._states(inputs_embeds, mask, positions, use_cache=False, **more).last_hidden_state
        return torch.cat([states[:, :1], states[:, :-1]], 1)

    def response_versions(self, versions: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        """What predicts the response tokens of rows with one prompt and several responses: states (N, B, R, D).

        versions (N, B, L): ids that differ in the last R columns alone, the response. A prompt that does not see the response
        is read once, with all versions behind it in one row.
        """
        mask, positions = self._layout(attention_mask, response_mask)
        size = response_columns(response_mask)
        first = mask.shape[-1] - size - 1  # the column before the response is read with it
        if first < 1 or self._prompt_sees_response():
            states = [self.hidden(self.embed(ids), attention_mask, response_mask=response_mask) for ids in versions]
            return torch.stack(states)[:, :, -size:]
        visible, column = versions_side_by_side(mask, first, len(versions))
        ids = torch.cat([versions[0][:, :first], *versions[:, :, first:]], 1)
        states = self._states(self.embed(ids), visible, positions[:, column], use_cache=False).last_hidden_state
        return torch.stack(states[:, first:].chunk(len(versions), 1))[:, :, :-1]

    def response_reader(self, attention_mask: Tensor, response_mask: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from ids (B, L) of the same prompts to what predicts their response tokens, the states (B, R, D).

        The last R columns are the response. A prompt that does not see it is read in the first call alone: later ones reuse
        its keys and values. Without derivatives.
        """
        mask, positions = self._layout(attention_mask, response_mask)
        prompt = mask.shape[-1] - response_columns(response_mask) - 1  # the column before the response is read with it
        if prompt < 1 or self._prompt_sees_response():
            return lambda ids: self.hidden(self.embed(ids), attention_mask, response_mask=response_mask)[
                :, prompt + 1 :
            ]
        cache = DynamicCache(config=self.config.get_text_config())

        @torch.no_grad()
        def read(ids: Tensor) -> Tensor:
            first = cache.get_seq_length()
            columns = slice(first, None)
            out = self._states(
                self.embed(ids[:, columns]),
                mask[:, :, columns],
                positions[:, columns],
                use_cache=True,
                **cache_argument(cache),
            )
            cache.crop(prompt - mask.shape[-1])  # negative: how many to drop
            return out.last_hidden_state[:, prompt - first : -1]

        return read

    def _layout(self, attention_mask: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Who sees whom (B, 1, L, L) and positions (B, L)."""
        first = before_response(response_mask)
        seen = attention_mask | first
        own = response_mask | first if self.options.separator == "response" else response_mask
        mask = response_attention(
            seen, own, block_length=self.block_length, prompt_sees_response=self._prompt_sees_response()
        )
        return mask, positions_from_mask(seen)

    def _prompt_sees_response(self) -> bool:
        return self.options.conversion == "bidirectional" and self.block_length is None

    def _states(self, inputs_embeds: Tensor, mask: Tensor, positions: Tensor, **more: Any) -> Any:
        dtype = self.causal.get_input_embeddings().weight.dtype
        return self.causal.get_decoder()(
            inputs_embeds=inputs_embeds.to(dtype), attention_mask=mask, position_ids=positions, **more
        )

    def lm_head(self, states: Tensor) -> Tensor:
        """Logits (..., V) of `hidden` states (..., D); `NEVER` for the mask and for ids that are no tokens."""
        return output_logits(self.causal, states) + self.allowed

    def forward(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, V) logits of the clean token at every position but the first."""
        return self.lm_head(self.hidden(self.embed(input_ids), attention_mask, response_mask=response_mask))

    def causal_logits(self, input_ids: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, V) logits of the causal model, with the attention of transformers."""
        self._attend_with(self.usual_attention)
        try:
            return self.causal(input_ids=input_ids, use_cache=False).logits
        finally:
            self._attend_with(ATTENTION)

    def _attend_with(self, implementation: str) -> None:
        inner = self.causal.get_base_model() if isinstance(self.causal, PeftModel) else self.causal
        inner.set_attn_implementation(implementation)

    # -- files ----------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """config.json, the causal model in a plain folder of its own with adapters merged, and the mask's embedding."""
        folder = Path(folder)
        save_merged(self.causal, folder / CAUSAL)
        save_file({"mask_embedding": self.mask_embedding.detach().cpu().contiguous()}, folder / MASK)
        described = {"model_type": MODEL_TYPE, **asdict(self.options)}
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def load_from_causal(
    path: str | Path,
    *,
    mask_token: str = "auto",
    conversion: Conversion = "causal_prompt",
    separator: Separator = "response",
    **options: Any,
) -> MaskedFromCausal:
    """The causal LM in `path`, a local folder or a hub name, as a network that fills masks; options: of `load_causal`.

    mask_token: a token of its tokenizer, see `choose_mask_token`.
    What `save_pretrained` wrote is trained further: it has its mask already, and needs the options that it was made with. A
    Dream folder too, with conversion=bidirectional and separator=response, as it was trained.
    Errors: UsageError as in `load_causal`, for architectures that do not follow the attention that is asked for, for a folder
    without a tokenizer, and for options that a folder with a mask was not made with.
    """
    folder = files.find_folder(path)
    described = files.read_json(folder / "config.json")
    if described.get("model_type") == MODEL_TYPE:
        _require_own_options(path, described, mask_token, conversion, separator)
        return load_masked(folder, **options).train()
    if is_dream_config(described):
        if (mask_token, conversion, separator) != ("auto", "bidirectional", "response"):
            raise UsageError(
                f"model.path={path} holds a Dream model, which fills masks already; type model.conversion=bidirectional, and "
                "leave model.mask_token and model.separator out"
            )
        return load_dream(folder, **options).train()
    causal = load_causal(folder, **options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a folder that it cannot read
        raise UsageError(
            f"model.path={path} holds no tokenizer ({str(error).splitlines()[0]}), whose mask token is needed; write it there "
            "with tokenizer.save_pretrained(FOLDER)"
        ) from error
    mask_id = tokenizer.convert_tokens_to_ids(choose_mask_token(tokenizer, mask_token))
    own = FromCausalOptions(mask_id, vocabulary_size(tokenizer), conversion, separator)
    model = MaskedFromCausal(causal, own)
    require_attention(model, f"model.path={path}")
    return model.train()


def _require_own_options(path: str | Path, described: dict[str, Any], mask_token: str, *given: str) -> None:
    """Raise UsageError unless the options are those that the masked model in `path` was made with."""
    own = described["conversion"], described["separator"]
    if mask_token != "auto" or given != own:
        raise UsageError(
            f"model.path={path} holds a masked model, which is trained further with what it was made with; type "
            f"model.conversion={own[0]} model.separator={own[1]}, and leave model.mask_token out"
        )


def load_masked(
    path: str | Path, *, option: str = "model.path", **options: Any
) -> "LladaModel | MaskedFromCausal | DitModel":
    """A network that fills masks: what `MaskedFromCausal.save_pretrained` wrote, a Dream, an MDLM or else a LLaDA model.

    option: what `path` is the value of. Errors: UsageError as in `load_llada`, also for masked diffusion models of other
    layouts, by name.
    """
    folder = files.find_folder(path, option)
    described = files.read_json(folder / "config.json")
    if is_dream_config(described):
        return load_dream(folder, **options)
    if is_mdlm_config(described):
        return load_dit(folder, **options)
    if described.pop("model_type", None) != MODEL_TYPE:
        return load_llada(folder, option=option, **options)
    model = MaskedFromCausal(load_causal(folder / CAUSAL, **options), FromCausalOptions(**described))
    with torch.no_grad():
        model.mask_start.copy_(load_file(folder / MASK)["mask_embedding"])
    return model.eval()


def load_dream(path: str | Path, **options: Any) -> MaskedFromCausal:
    """A published Dream model (2508.15487): Qwen2's layers, in which all positions see each other; options: of `load_causal`.

    Its logits are those of the original, but for the mask and for ids that are no tokens, which have probability 0 here.
    Errors: UsageError as in `load_causal`, for tensors that are missing or unexpected, and for fields that Qwen2 lacks.
    """
    folder = files.find_folder(path)
    fields = files.read_json(folder / "config.json")
    config, mask_id = Qwen2Config(**config_from_dream(fields)), dream_mask_id(fields)
    with torch.device("meta"):
        expected = files.expected_shapes(Qwen2ForCausalLM(config), tied=config.tie_word_embeddings)
    files.match_names(expected, files.list_tensors(folder), lambda name: None, folder)
    words = _words_of_dream(folder, mask_id, config.vocab_size)
    causal = load_causal(folder, config=config, **options)
    model = MaskedFromCausal(causal, FromCausalOptions(mask_id, words, "bidirectional"))
    with torch.no_grad():
        model.mask_start.copy_(causal.get_input_embeddings().weight[mask_id])
    return model.eval()


def _words_of_dream(folder: Path, mask_id: int, rows: int) -> int:
    """How many ids are tokens: all rows where the folder has no tokenizer. Its own is the code of Qwen2's."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return rows
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.mask_token_id not in (None, mask_id):
        raise UsageError(
            f"the mask of {folder} has the id {tokenizer.mask_token_id} in its tokenizer and {mask_id} in config.json; put the "
            "tokenizer that it was trained with into its folder"
        )
    return min(rows, vocabulary_size(tokenizer))


def require_merged(model: MaskedFromCausal) -> None:
    """Raise UsageError for a teacher whose adapters are still beside its weights."""
    if isinstance(model.causal, PeftModel):
        raise UsageError(
            "a student needs a teacher that was trained; type teacher.path=<the model/ folder of a run of "
            "experiment=masked_from_causal>, in which its adapters are merged"
        )


@torch.no_grad()
def require_prefix(model: "LladaModel | MaskedFromCausal") -> None:
    """Raise UsageError for an architecture that a soft prompt does not reach: a gate of 0 changes nothing, another one does."""
    if not isinstance(model, MaskedFromCausal):
        return
    try:
        reached = _reached_by_prefix(model)
    except Exception:  # what an architecture makes of keys that it does not expect
        reached = False
    if not reached:
        raise UsageError(
            f"a model of type {model.config.get_text_config().model_type} takes no soft prompt, which this student needs; type "
            "module=step_halving, or a teacher of the layout of Llama or Qwen3"
        )


def _reached_by_prefix(model: MaskedFromCausal) -> bool:
    config = model.config.get_text_config()
    layers, (heads, width) = config.num_hidden_layers, prefix_heads(config)
    keys, gate = torch.ones(layers, 1, heads, 2, width), torch.ones(layers, config.num_attention_heads)
    ids = torch.tensor([[k for k in range(1, 6) if k != model.mask_id][:4]], device=model.device)
    response = torch.arange(4, device=model.device).expand(1, -1) >= 2
    with trial(model):
        plain, closed, opened = (
            model.hidden(model.embed(ids), torch.ones_like(response), prefix, response)
            for prefix in (
                None,
                *(Prefix(*(part.to(model.device) for part in (keys, keys, g * gate))) for g in (0.0, 5.0)),
            )
        )
    return alike(plain, closed) and not alike(plain, opened)


@torch.no_grad()
def require_attention(model: MaskedFromCausal, where: str) -> None:
    """Raise UsageError for an architecture that does not attend as it is told to. where: what was typed.

    With a block length of 1 its logits have to be the causal model's; with the whole response as one block, the prompt must
    not see the response, an earlier response position has to see a later one, and neither a cached prompt nor two responses
    behind one prompt change anything.
    """
    config = model.config.get_text_config()
    kinds = limited_layers(config)
    if kinds:
        raise UsageError(
            f"{where}: a model of type {config.model_type} has layers of {', '.join(sorted(kinds))}, and its response could "
            "not see all of itself; type a model with full attention, such as model.path=Qwen/Qwen3-0.6B"
        )
    try:
        obeys = _obeys(model)
    except Exception as error:  # what an architecture makes of masks that it does not know
        raise UsageError(_UNFIT.format(where=where, kind=config.model_type)) from error
    if not obeys:
        raise UsageError(_UNFIT.format(where=where, kind=config.model_type))


_UNFIT = (
    "{where}: a model of type {kind} does not follow the attention between prompt and response that this needs; type one of "
    "the layout of Llama or Qwen3, such as model.path=Qwen/Qwen3-0.6B"
)


def _obeys(model: MaskedFromCausal) -> bool:
    with trial(model):
        words = [k for k in range(1, 9) if k != model.mask_id]
        ids = torch.tensor([words[:6], [*words[:5], words[6]]], device=model.device)
        response = torch.arange(6, device=model.device).expand(2, -1) >= 3
        seen = torch.ones_like(response)
        whole = model.hidden(model.embed(ids), seen, response_mask=response)
        read = model.response_reader(seen, response)
        again = [read(ids) for _ in range(2)]
        other = ids.clone()
        other[:, 4] = words[0]
        versions = model.response_versions(torch.stack([ids, other]), seen, response)
        apart = model.hidden(model.embed(other), seen, response_mask=response)
        model.block_length = 1
        blocks = model(ids, seen, response)[:, 1:]
        model.block_length = None
        causal = model.causal_logits(ids)
    tokens = model.allowed == 0
    as_causal = alike(blocks[..., tokens], causal[:, :-1, tokens])
    prompt_apart = model.options.conversion == "bidirectional" or alike(*whole[:, :3])
    same_with_cache = all(alike(found, whole[:, 3:]) for found in again)
    side_by_side = alike(versions, torch.stack([whole, apart])[:, :, 3:])
    return as_causal and prompt_apart and same_with_cache and side_by_side and not torch.equal(*whole[:, 4])
