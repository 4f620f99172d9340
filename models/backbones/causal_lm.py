"""Any Hugging Face causal LM: read from a folder or the hub, adapted with LoRA, evaluated, written out.

Only safetensors are read and no code of a checkpoint is run.
Legend: B batch, T positions, D width, V vocabulary, F numbers of all chosen layers together.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from models.backbones import checkpoint_files as files
from models.backbones.abilities import alike, require_left_to_right, trial
from models.functional.errors import UsageError
from models.functional.next_token import CausalText
from models.functional.nll import chosen_nll


def load_causal(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    config: PreTrainedConfig | None = None,
    option: str = "model.path",
) -> PreTrainedModel | PeftModel:
    """The causal LM in `path`, a local folder or a hub name; "auto" keeps the type that its weights are stored in.

    lora_rank: low-rank adapters on every linear layer of attention and MLP, which then train alone; None trains everything.
    lora_alpha: their scale is lora_alpha / lora_rank; None is twice the rank.
    config: what the files hold, where config.json is of another layout; generation_config.json is not read then.
    option: what `path` is the value of, as errors name it.
    Errors: UsageError for a folder that does not exist, one without safetensors, and other kinds of models.
    """
    if lora_rank is not None and lora_rank < 1:
        raise UsageError(f"model.lora_rank={lora_rank} must be at least 1; null trains every weight")
    if not 0 <= lora_dropout < 1:
        raise UsageError(f"model.lora_dropout={lora_dropout} must be at least 0 and less than 1")
    device, wanted = files.parse_device(device), "auto" if dtype == "auto" else files.parse_dtype(dtype)
    folder = files.find_folder(path, option)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UsageError(
            f"{option}={path} holds an adapter without its model; type the folder of the whole model, such as the "
            "model_merged/ that experiment=next_token_qwen leaves, or write one with merge_and_unload() of peft"
        )
    kind = files.read_json(folder / "config.json").get("model_type") if config is None else config.model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"{option}={path} holds a {kind or 'nameless'} model, which is no causal LM of transformers (remote code is "
            f"not run); type a folder or hub name such as {option}=Qwen/Qwen3-0.6B"
        )
    files.list_tensors(folder)  # refuses pickles and files that are cut short
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=wanted, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    if config is not None:  # transformers 5.5 refuses to save the options of another sampler
        model.generation_config = GenerationConfig.from_model_config(config)
    require_left_to_right(model, option, path)
    if lora_rank is not None:
        model = with_adapters(model, lora_rank, lora_alpha, lora_dropout)
    return model.to(device).train()


def load_trained(folder: str | Path, option: str = "model.path") -> PreTrainedModel | PeftModel:
    """What `save_causal` wrote: a whole model, or an adapter on the base that it names. Ready to answer.

    option: what `folder` is the value of.
    Errors: UsageError as in `load_causal`, also for an adapter whose base is no longer there.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        return load_causal(folder, option=option).eval()
    if not (folder / "adapter_model.safetensors").is_file():
        raise UsageError(f"{folder} holds no adapter_model.safetensors; only safetensors are read")
    base = files.read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if base is None:
        raise UsageError(
            f"{folder}/adapter_config.json names no base_model_name_or_path; write the path of its base there"
        )
    whole = load_causal(base, option=f"{folder}/adapter_config.json: base_model_name_or_path")
    return PeftModel.from_pretrained(whole, folder).eval()


def with_adapters(model: PreTrainedModel, rank: int, alpha: float | None = None, dropout: float = 0.0) -> PeftModel:
    """Low-rank adapters (Hu et al., 2021) on every linear layer but the head; they start as no-ops."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's linear layers
    )
    return get_peft_model(model, config)


def require_causal(model: nn.Module, objective: str) -> None:
    """Raise UsageError for a model that sees the tokens it would have to predict."""
    if hasattr(model, "embed"):
        raise UsageError(
            f"module/objective={objective} needs a causal model; type model=small (made to fit) or model=causal_lm"
        )


def causal_logits(model: nn.Module, text: CausalText) -> Tensor:
    """Logits (B, T, V) of the token after each position."""
    return model(**_arguments(text)).logits


def causal_hidden(model: nn.Module, text: CausalText) -> Tensor:
    """Hidden states (B, T, D) after the last norm."""
    return model.get_decoder()(**_arguments(text)).last_hidden_state


def scored_logits_and_states(model: nn.Module, text: CausalText, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits (M, V) of the token after each scored position, and the hidden states (B, T, F) after these layers."""
    columns = text.weights.any(0).nonzero().squeeze(-1)  # no others go through the output layer
    out = model(**_arguments(text), output_hidden_states=True, logits_to_keep=columns)
    return out.logits[text.weights[:, columns]], chosen_states(out, layers)


def chosen_states(output: Any, layers: Sequence[int]) -> Tensor:
    """(B, T, F): the states after these layers, concatenated. output: of a forward pass with output_hidden_states=True.

    Layer 0 is the embedding; the last one is after the last norm.
    """
    return torch.cat([output.hidden_states[layer] for layer in layers], -1)


def causal_nll(model: nn.Module, text: CausalText) -> Tensor:
    """-log p of each scored target in nats, 0 elsewhere: (B, T)."""
    return chosen_nll(causal_logits(model, text)[text.weights], text.targets, text.weights)


def output_head(model: nn.Module) -> nn.Module:
    """The layer from hidden states to logits."""
    return model.get_output_embeddings()


def output_logits(model: nn.Module, states: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Logits (..., V) from hidden states (..., D) after the last norm, scaled and capped as the model does.

    tokens (S,): the logits (..., S) of these alone.
    """
    config, head = model.config, output_head(model)
    if tokens is None:
        logits = head(states)
    else:
        bias = getattr(head, "bias", None)
        logits = F.linear(states, head.weight[tokens], None if bias is None else bias[tokens])
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def require_known_output(model: nn.Module) -> None:
    """Raise UsageError where a model's logits are others than `output_logits` of its hidden states."""
    with trial(model) as device:
        arguments = {"input_ids": torch.tensor([[1, 2, 3, 4]], device=device), "use_cache": False}
        states, logits = model.get_decoder()(**arguments).last_hidden_state, model(**arguments).logits
    if not alike(output_logits(model, states), logits):
        raise UsageError(
            f"a model of type {model.config.model_type} computes more than a linear layer from its last hidden states; type "
            "one of the layout of Llama or Qwen3, such as model.path=Qwen/Qwen3-0.6B"
        )


def _arguments(text: CausalText) -> dict:
    # transformers finds the documents of a packed row by the positions that start again, as long as no mask is given
    mask = text.attention_mask
    if mask is not None and mask.ndim == 2:
        mask = mask.long()
    return {"input_ids": text.ids, "attention_mask": mask, "position_ids": text.position_ids, "use_cache": False}


def save_causal(model: PreTrainedModel | PeftModel, folder: str | Path, tokenizer=None) -> Path:
    """Write a plain folder: the adapter alone (for `PeftModel.from_pretrained`) or the model (for transformers).

    A half-written folder never appears.
    """
    folder = Path(folder)
    with files.staging_folder(folder) as staging:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    return folder


def save_merged(model: PreTrainedModel | PeftModel, folder: str | Path, tokenizer=None) -> Path:
    """Write a plain transformers folder, with adapters added into the weights; the model itself stays as it is."""
    whole = copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
    return save_causal(whole, folder, tokenizer)
