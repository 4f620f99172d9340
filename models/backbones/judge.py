"""A judge of generated texts: a causal LM, trained on the same corpus by another run, that scores their likelihood.

Legend: N texts, T tokens of each, all of the judge's own vocabulary.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.backbones.causal_lm import causal_nll, load_trained
from models.functional.errors import UsageError
from models.functional.next_token import causal_text


class Judge:
    """model: a causal LM; tokenizer: of the texts that it reads; batch_size: texts read at once."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    @torch.no_grad()
    def __call__(self, texts: Tensor) -> Tensor:
        """Nats (N, T - 1) of each token given those before it; a text's first token is given."""
        rows = texts.to(next(self.model.parameters()).device).split(self.batch_size)
        nll = [causal_nll(self.model, causal_text({"input_ids": r[:, :-1], "labels": r[:, 1:]})) for r in rows]
        return torch.cat(nll).cpu()

    def require_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UsageError unless the texts' tokens are the judge's own."""
        if self.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UsageError(
                f"the judge has a vocabulary of {len(self.tokenizer)} tokens, which is not the corpus' ({len(tokenizer)}); "
                "type data.tokenizer=<the judge's folder>, or train a judge with this experiment's data options"
            )


def load_judge(path: str | Path | None) -> Judge | None:
    """The judge in a folder that `experiment=next_token_text` exported, or any with a causal LM and its tokenizer.

    None for no path. Raises UsageError as `load_trained` does.
    """
    if path is None:
        return None
    model = load_trained(path)
    if not (Path(path) / "tokenizer_config.json").is_file():
        raise UsageError(
            f"data.judge.path={path} holds no tokenizer; give a folder that experiment=next_token_text wrote"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return Judge(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
