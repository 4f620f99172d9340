"""Two real processes, each with another number of tokens, take the steps that one takes with all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
from helpers.causal import PackedStream, tiny_causal
from lightning import Trainer
from lightning_modules.pretrain import PretrainModule
from models.objectives.next_token import NextToken
from torch.utils.data import DataLoader

folder, world, weighted = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"


class Shared(PackedStream):
    # three batches of four rows, of which the first two count in part; a rank takes two of the four
    def train_dataloader(self):
        for batch in self.batches:
            batch["labels"][0, 1:], batch["labels"][1, 4:] = -100, -100
        rank = self.trainer.global_rank
        few = slice(None) if world == 1 else slice(2 * rank, 2 * rank + 2)
        return DataLoader([{name: column[few] for name, column in b.items()} for b in self.batches], batch_size=None)

    val_dataloader = train_dataloader


if __name__ == "__main__":
    if not weighted:
        from lightning_modules.training.token_weights import TokenWeights
        TokenWeights.weight, TokenWeights.finish = lambda *_: 1.0, lambda *_: None
    torch.manual_seed(0)
    module = PretrainModule(tiny_causal(7), NextToken(), lr=1e-2, warmup_steps=1)
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_steps=3, val_check_interval=3,
        num_sanity_val_steps=0, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, Shared(sizes=(4, 4, 4)))
    if trainer.is_global_zero:
        weights = {name: p.detach() for name, p in module.model.named_parameters()}
        torch.save([weights, float(trainer.callback_metrics["val/nll"])], f"{folder}/{world}-{weighted}.pt")
"""


@pytest.mark.slow
def test_two_ranks_of_unlike_sizes_take_the_steps_of_one(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    found = {}
    for world, weighted in ((1, True), (2, True), (2, False)):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "train.py"), str(tmp_path), str(world), str(weighted)],
            cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | own,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found[world, weighted] = torch.load(tmp_path / f"{world}-{weighted}.pt", weights_only=True)
    (alone, nll), (together, nll_together), (unweighted, _) = found.values()
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-4, atol=1e-5)
    assert nll_together == pytest.approx(nll, rel=1e-5)
    assert max((unweighted[name] - weight).abs().max().item() for name, weight in alone.items()) > 1e-3
