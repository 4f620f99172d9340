"""Two real processes read together what one reads alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import torch
from lightning import LightningModule, Trainer
from datamodules.packed_text import PackedTextDataModule

folder, world = sys.argv[1], int(sys.argv[2])


class Reader(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.rows, self.scored = torch.nn.Linear(1, 1), [], 0

    def training_step(self, batch, batch_idx):
        self.rows.append(batch["input_ids"].tolist())
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.scored += batch["labels"].numel()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    data = PackedTextDataModule(
        name="ranks", train=f"{folder}/train.txt", val=f"{folder}/val.txt", test=f"{folder}/val.txt", cut="line",
        tokenizer="byte", vocab_size=0, sequence_length=24, batch_size=8 // world, eval_batch_size=4,
        cache_dir=f"{folder}/cache",
    )
    module = Reader()
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_steps=20, max_epochs=-1,
        val_check_interval=10, check_val_every_n_epoch=None, num_sanity_val_steps=0, use_distributed_sampler=False,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, data)
    with open(f"{folder}/{world}-{trainer.global_rank}.json", "w") as file:
        json.dump([module.rows, module.scored], file)
"""


@pytest.mark.slow
def test_two_processes_read_what_one_reads(tmp_path):
    (tmp_path / "read.py").write_text(SCRIPT)
    for name, lines in (("train", 50), ("val", 9)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {k} is {k * k} long, é\n" for k in range(lines)))
    for world in (1, 2):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "read.py"), str(tmp_path), str(world)],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (alone, scored), first, second = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in ("1-0", "2-0", "2-1")
    )
    together = [
        [row for rows in zip(*batch, strict=True) for row in rows] for batch in zip(first[0], second[0], strict=True)
    ]
    assert together == alone
    assert len({len(batch) for batch in alone}) == 1
    assert len(alone) > 2 * (sum(len(f"train {k} is {k * k} long, é".encode()) + 1 for k in range(50)) // (24 * 8))
    assert first[1] + second[1] == scored
    assert min(first[1], second[1]) > 0
