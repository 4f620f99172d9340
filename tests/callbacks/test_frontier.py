"""Forward passes and tokens per forward pass of the final table."""

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.trainer import quiet_trainer

from callbacks.frontier import FrontierReport, tokens_per_forward
from lightning_modules.pretrain import PretrainModule
from models.diffusion.objective import MaskedDiffusion
from models.objectives.next_token import NextToken
from reporting.record import read_record
from reporting.tpf_figure import aup_of


def test_tokens_per_forward_by_hand():
    responses = torch.tensor([[5, 6, 1, 1], [5, 1, 7, 1], [5, 6, 7, 8]])  # 1 ends a text; 3 + 2 + 4 tokens
    assert tokens_per_forward(responses, torch.tensor([1, 2, 3]), 1) == 9 / 6
    assert tokens_per_forward(responses, torch.tensor([0, 0, 0]), 1) is None


def test_rows_of_commit_rules_have_the_mean_of_their_passes(tiny_llada, tiny_oracle, tmp_path):
    ids = tiny_oracle.special_ids()
    model = tiny_llada(**ids)
    rules = {"confidence": [0.2], "entropy": [100.0]}
    module = PretrainModule(model, MaskedDiffusion(), forwards=(2,), commit_rules=rules)
    quiet_trainer(1, callbacks=[FrontierReport(tmp_path, "one", {})]).test(module, tiny_oracle, verbose=False)
    rows = {row["decoder"]: row for row in read_record(tmp_path / "record.json")["rows"]}
    threshold, whole = rows["teacher, confidence ≥ 0.2"], rows["teacher, entropy ≤ 100"]
    assert 1 < threshold["nfe"] <= tiny_oracle.response_length
    assert whole["nfe"] == 1  # every position at once
    assert rows["teacher, sampled"]["nfe"] == 2
    assert whole["cost"]["tokens_per_forward"] == pytest.approx(
        2 * rows["teacher, sampled"]["cost"]["tokens_per_forward"], rel=0.5
    )
    # rules stand on the curve of the scheduled decoders
    curve = aup_of({"experiment": "one", "seed": 0, "data": {"name": "oracle"}, "rows": list(rows.values())})
    assert read_record(tmp_path / "record.json")["aup"] == curve
    assert set(curve["methods"]) == {"teacher"}
    assert (tmp_path / "tpf.png").stat().st_size > 1000
    # a batch takes as many passes as its text with the most, a text alone its own
    assert threshold["cost"]["nfe_per_batch"] >= threshold["nfe"]
    assert whole["cost"]["nfe_per_batch"] == 1
    assert threshold["cost"]["seconds_alone"] > 0


def test_a_record_names_the_commit_at_which_its_run_began(tiny_llada, tiny_oracle, tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.frontier.current_commit", lambda: "before")
    report = FrontierReport(tmp_path, "one", {})
    monkeypatch.setattr("callbacks.frontier.current_commit", lambda: "after")
    module = PretrainModule(tiny_llada(**tiny_oracle.special_ids()), MaskedDiffusion(), forwards=(1,))
    quiet_trainer(1, callbacks=[report]).test(module, tiny_oracle, verbose=False)
    assert read_record(tmp_path / "record.json")["commit"] == "before"


def test_a_model_that_generates_from_left_to_right_has_the_time_of_its_first_token(tiny_oracle, tmp_path):
    ids = tiny_oracle.special_ids()
    module = PretrainModule(tiny_causal(ids.pop("vocab_size"), **ids), NextToken(), temperatures=(0.0,))
    quiet_trainer(1, callbacks=[FrontierReport(tmp_path, "one", {})]).test(module, tiny_oracle, verbose=False)
    rows = [row for row in read_record(tmp_path / "record.json")["rows"] if row["method"] == "teacher"]
    assert [row["decoder"] for row in rows] == ["autoregressive", "autoregressive, greedy"]
    for row in rows:
        assert 0 < row["cost"]["first_token_seconds"] < row["cost"]["seconds_alone"]
        assert row["cost"]["nfe_per_batch"] == tiny_oracle.response_length
