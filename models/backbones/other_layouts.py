"""Masked diffusion models that are published in layouts which no network here computes."""

from models.functional.errors import UsageError

# model_type of config.json, or the architecture where models share a type -> what no network here computes
_UNSUPPORTED = {
    "llada2_moe": "LLaDA-2: a mixture of experts with block-causal attention",
    "LLaDAMoEModelLM": "LLaDA-MoE: a mixture of experts",
    "LLaDAMoEModel": "LLaDA-MoE: a mixture of experts",
    "sdar": "SDAR: block-causal attention on Qwen3's layers",
    "sdar_moe": "SDAR: a mixture of experts with block-causal attention",
    "Fast_dLLM_Qwen": "Fast-dLLM: block-causal attention on Qwen2's layers",
    "bd3lm": "BD3-LM: block-causal attention on a DiT",
    "duo": "Duo: uniform-state diffusion, which has no masks",
    "DUO": "Duo: uniform-state diffusion, which has no masks",
    "a2d-llama": "bidirectional attention on Llama's layers",
    "a2d-qwen2": "bidirectional attention on Qwen2's layers",
    "a2d-qwen3": "bidirectional attention on Qwen3's layers",
}


def unsupported_layout(config: dict) -> str | None:
    """The name in config.json of a masked diffusion model that is known and not read; None for any other model."""
    names = (config.get("model_type"), *(config.get("architectures") or []))
    return next((name for name in names if name in _UNSUPPORTED), None)


def refuse_unsupported(config: dict, where: str) -> None:
    """Raise UsageError for a model of `unsupported_layout`. where: the folder."""
    name = unsupported_layout(config)
    if name is not None:
        raise UsageError(
            f"{where} holds a {name} model ({_UNSUPPORTED[name]}), which is not supported; type a model of LLaDA's layout "
            "(GSAI-ML/LLaDA-8B-Instruct), of Dream's (Dream-org/Dream-v0-Instruct-7B), of MDLM's (kuleshov-group/mdlm-owt), or "
            "a folder that this framework saved"
        )
