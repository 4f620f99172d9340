"""A tokenizer folder as BERT's: word pieces between [CLS] and [SEP], with a [MASK], and without `<bos>` and end-of-text."""

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def word_pieces(folder: Path) -> Path:
    """Saves a tokenizer of single characters of lower case, and returns its folder."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*SPECIAL.values(), *characters, *(f"##{c}" for c in characters)]
    backend = Tokenizer(models.WordPiece({piece: k for k, piece in enumerate(pieces)}, unk_token=SPECIAL["unk"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = {f"{name}_token": token for name, token in SPECIAL.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder
