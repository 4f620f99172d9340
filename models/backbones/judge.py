"""A judge of generated texts: a causal LM that scores their likelihood, in its own vocabulary.

Legend: N texts.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.backbones.abilities import context_of
from models.backbones.causal_lm import causal_nll, load_trained
from models.backbones.checkpoint_files import find_folder
from models.functional.errors import UsageError
from models.functional.generated_text import JudgedText, TextNats
from models.functional.next_token import IGNORED, causal_text

OPTION = "data.judge.path"


class Judge:
    """model: a causal LM; tokenizer: of the texts that it reads. batch_tokens: tokens read at once.

    context: the tokens that the model can read together. A longer text is read in pieces of that length, as MDLM's code
    does, and the first token of each is given.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_tokens: int = 4096) -> None:
        self.model, self.tokenizer, self.batch_tokens = model.eval(), tokenizer, batch_tokens
        self.context = context_of(model) if hasattr(model, "config") else None

    @torch.no_grad()
    def __call__(self, texts: list[JudgedText]) -> TextNats:
        """The nats of the tokens that count, each given those before it; the first token of a text is given."""
        # 1. texts in pieces that the model can read
        pieces = [(n, piece) for n, text in enumerate(texts) for piece in self._pieces(text)]
        nats, tokens = torch.zeros(len(texts), dtype=torch.float64), torch.zeros(len(texts), dtype=torch.long)
        for batch in self._batches(pieces):
            # 2. the NLL of the tokens that count; padding on the right is seen by no token
            rows, found = torch.tensor([n for n, _ in batch]), self._nll([piece for _, piece in batch])
            # 3. each text's sum over its pieces
            nats.index_add_(0, rows, found.nats)
            tokens.index_add_(0, rows, found.tokens)
        return TextNats(nats, tokens)

    def _pieces(self, text: JudgedText) -> Iterator[JudgedText]:
        step = self.context or max(1, len(text.ids))
        for at in range(0, len(text.ids), step):
            piece = JudgedText(text.ids[at : at + step], text.counts[at : at + step])
            if any(piece.counts[1:]):
                yield piece

    def _batches(self, pieces: list[tuple[int, JudgedText]]) -> Iterator[list[tuple[int, JudgedText]]]:
        batch: list[tuple[int, JudgedText]] = []
        for piece in pieces:
            longest = max(len(text.ids) for _, text in [*batch, piece])
            if batch and longest * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(piece)
        if batch:
            yield batch

    def _nll(self, texts: list[JudgedText]) -> TextNats:
        longest = max(len(text.ids) for text in texts)
        ids, labels = torch.zeros(2, len(texts), longest, dtype=torch.long)
        labels.fill_(IGNORED)
        for row, (own, counts) in enumerate(texts):
            ids[row, : len(own)] = torch.tensor(own)
            labels[row, : len(own)] = torch.tensor(own).masked_fill(~torch.tensor(counts), IGNORED)
        device = next(self.model.parameters()).device
        read = {"input_ids": ids[:, :-1].to(device), "labels": labels[:, 1:].to(device)}
        nll = causal_nll(self.model, causal_text(read))
        return TextNats(nll.sum(-1, dtype=torch.float64).cpu(), (labels[:, 1:] != IGNORED).sum(-1))


def load_judge(path: str | Path | None) -> Judge | None:
    """The judge in a folder, or of the hub: any causal LM of transformers with its tokenizer. It computes in float32.

    None for no path. Raises UsageError, naming data.judge.path, for what cannot be read.
    """
    if path is None:
        return None
    folder = find_folder(path, OPTION)
    model = load_trained(folder, OPTION)
    if not (folder / "tokenizer_config.json").is_file():
        raise UsageError(f"{OPTION}={path} holds no tokenizer; give a folder with a causal LM and its tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Judge(model.float().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
