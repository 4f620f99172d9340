"""A tokenizer as GPT-2's: bytes, one end token that also begins texts, no padding, and a mask that was added last."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def gpt2_bytes(folder: Path) -> Path:
    """Saves a tokenizer of single bytes, and returns its folder."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END]
    backend = Tokenizer(models.BPE({token: k for k, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END, unk_token=END)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder)
    return folder
