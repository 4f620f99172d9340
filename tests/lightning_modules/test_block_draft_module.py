"""Training of a block drafter for one model and for a pair: texts, resume, files, and its figures beside decoding's."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.trainer import Losses, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.frontier import FrontierReport
from datamodules.oracle.datamodule import OracleDataModule
from lightning_modules.block_draft import BlockDraftModule
from lightning_modules.qstar_decoding import QStarDecodingModule
from models.backbones.causal import build_causal
from models.functional import ranks
from models.functional.errors import UsageError
from models.functional.rows import prompted_rows
from models.speculative.costs import ForwardCosts
from models.speculative.decoder import prompts_of
from models.speculative.drafter_files import load_drafter, read_drafter
from models.speculative.options import QStarOptions
from models.speculative.random_source import TorchRandomSource


def corpus() -> OracleDataModule:
    data = OracleDataModule(
        size="tiny", style=0.5, train_rows=64, val_rows=32, test_rows=32, batch_size=16, eval_batch_size=32
    )
    data.setup()
    return data


def network(data, seed, padding=0):
    """padding: columns of the output layer that are no tokens."""
    torch.manual_seed(seed)
    ids = data.special_ids()
    ids["vocab_size"] += padding
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = build_causal(**ids, **sizes, max_position_embeddings=32, rope_theta=10_000.0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(std=0.4)
    return model


@pytest.fixture
def data():
    return corpus()


def build(data, alone=False, **options):
    options = {"draft_length": 3, "window": 6, "rank": 4, "anchors": 3, "lr": 1e-2, "warmup_steps": 0} | options
    torch.manual_seed(7)
    if alone:
        return BlockDraftModule(network(data, 0), **options)
    return BlockDraftModule(theta=network(data, 0), target=network(data, 1), **options)


def weights(module):
    return {name: p.detach().clone() for name, p in module.drafter.own_parameters().items()}


@pytest.mark.parametrize(("dependence", "alone"), [("none", True), ("markov", False), ("noise", True)])
def test_training_lowers_the_loss_and_leaves_the_verifiers_alone(data, dependence, alone):
    module, losses = build(data, alone, dependence=dependence, pool=2), Losses()
    before = {name: p.clone() for name, p in module.theta.named_parameters()}
    quiet_trainer(30, callbacks=[losses]).fit(module, data)
    assert sum(losses.seen[-5:]) < 0.9 * sum(losses.seen[:5])
    assert all(torch.equal(p, before[name]) for name, p in module.theta.named_parameters())
    assert len(module._pool.texts) == 2


@pytest.mark.parametrize(("stop", "pool"), [(2, 0), (2, 3), (5, 3)])
def test_resumed_is_uninterrupted(data, tmp_path, stop, pool):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = build(data, pool=pool), build(data, pool=pool)
    start = weights(whole)
    quiet_trainer(7, callbacks=[keep], enable_checkpointing=True).fit(whole, data)
    path = tmp_path / f"step={stop}.ckpt"
    quiet_trainer(7).fit(resumed, corpus(), ckpt_path=path, weights_only=True)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], weight, atol=0, rtol=0)
    assert any(not torch.equal(start[name], weight) for name, weight in weights(whole).items())
    held = torch.load(path, weights_only=True)["state_dict"]
    assert set(held) == {f"drafter.{name}" for name in start}


def test_texts_are_of_the_target_up_to_their_ends_and_a_pool_keeps_them(data):
    module = build(data, pool=1)
    trainer = quiet_trainer(2)
    trainer.fit(module, data)
    rows = module._pool.texts[0]
    assert rows["completion_mask"].sum() <= rows["response_mask"].sum()
    drawn = module._with_texts(prompted_rows(data.rows["test"][:8]), torch.Generator().manual_seed(0))
    given = data.rows["test"][:8]["input_ids"]
    columns = data.response_length
    assert torch.equal(drawn["input_ids"][:, :-columns], given[:, :-columns])
    assert not torch.equal(drawn["input_ids"][:, -columns:], given[:, -columns:])
    own = build(data, texts="data")
    own.end_ids = data.end_ids()
    kept = own._with_texts(prompted_rows(data.rows["test"][:8]), torch.Generator())
    assert torch.equal(kept["input_ids"], given)


def test_half_a_row_of_packed_text_is_the_prompt():
    ids = torch.arange(12).view(2, 6)
    rows = prompted_rows({"input_ids": ids, "labels": ids})
    assert rows["response_mask"].tolist() == [[False] * 3 + [True] * 3] * 2
    assert rows["attention_mask"].all()


@pytest.mark.parametrize("gamma", [1, "auto"])
def test_the_training_figure_of_what_is_served_has_as_many_tokens_a_draft(data, gamma, monkeypatch):
    module = build(data, gamma=gamma, costs="measured", pool=2, draft_length=4)
    # a draft of one token costs little, and further ones pay only where they are often accepted
    monkeypatch.setattr("models.speculative.decoder.forward_costs", lambda *given, **more: ForwardCosts(0.1, 0.3))
    quiet_trainer(20, limit_val_batches=0).fit(module, data)
    rows = {name: column.repeat(8, 1) for name, column in prompted_rows(next(iter(data.val_dataloader()))).items()}
    served = module._served(rows, torch.Generator().manual_seed(0))
    assert 0.1 < float(served["served_length"]) == pytest.approx(float(served["length_at_served"]), rel=0.1)
    module._terms = lambda *given, terms=module._terms: terms(*given[:5])  # the control: of whole blocks
    whole = module._served(rows, torch.Generator().manual_seed(0))
    assert float(whole["length_at_served"]) > 1.2 * float(served["served_length"])


@pytest.mark.parametrize("dependence", ["markov", "noise"])
def test_validation_shows_what_is_served_beside_the_training_figure(data, dependence):
    """The same anchors and texts: both figures agree but for sampling noise, and not with another drafter's."""
    module = build(data, dependence=dependence, pool=2, served_rows=32)
    trainer = quiet_trainer(20, val_check_interval=20)
    trainer.fit(module, data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rows = {name: column.repeat(8, 1) for name, column in prompted_rows(next(iter(data.val_dataloader()))).items()}
    served = module._served(rows, torch.Generator().manual_seed(0))
    assert float(served["served_length"]) == pytest.approx(float(served["length_at_served"]), rel=0.1)
    assert {"val/accepted_length", "val/served_length", "val/length_at_served", "val/served_1", "val/accept_3"} <= set(
        found
    )
    with torch.no_grad():
        module.drafter.norm.weight.mul_(-1.0)
    other = module._served(rows, torch.Generator().manual_seed(0))
    assert float(other["served_length"]) < 0.8 * float(served["served_length"])


def test_a_test_run_records_what_drafts_were_worth(data, tmp_path):
    report = FrontierReport(str(tmp_path), "trial", {})
    quiet_trainer(1, callbacks=[report]).test(build(data, True), data, verbose=False)
    rows = {row["decoder"]: row for row in report.record["rows"]}
    assert list(rows)[:3] == [
        "one model, it runs at every token", "one model, n-grams draft", "one model, blocks are drafted"
    ]  # fmt: skip
    drafts = report.record["drafts"]["block_drafter"]
    assert 0 < drafts["acceptance"] < 1
    assert len(drafts["acceptance_at"]) == 3
    assert drafts["expected_accepted_length"] == pytest.approx(drafts["accepted_length"], rel=0.25)
    assert 1 < drafts["tokens_per_verifier_forward"] < 1 + drafts["accepted_length"] + 1e-9
    assert rows["one model, blocks are drafted"]["cost"]["acceptance"] == drafts["acceptance"]
    assert rows["one model, blocks are drafted"]["cost"]["accepted_length"] == drafts["accepted_length"]


@pytest.mark.parametrize("verify", ["token", "block", "shared_noise"])
@pytest.mark.parametrize("cache", [True, False])
def test_drafts_are_verified_as_the_options_say(data, verify, cache):
    module = build(data, verify=verify, cache=cache, top_k=4, theta_weight=0.25)
    module.end_ids = data.end_ids()
    for scheme in ("naive", "ngram", "block_drafter"):
        how = module.decoder(scheme, data.response_length)
        assert (how.options.verify, how.options.cache, how.options.gamma) == (verify, cache, 3)
        assert (how.mixture.top_k, how.mixture.theta_weight) == (4, 0.25)
        assert how(prompted_rows(data.rows["test"][:4]), torch.Generator().manual_seed(0)).shape[0] == 4


def test_what_a_pool_keeps_changes_no_step(data):
    """With the verifiers' states kept, they read a text once, and the weights are the same to the last bit."""
    calls, found = {}, {}
    for keeps in ("texts", "reads", "half_reads"):
        module = build(data, pool=2, pool_keeps=keeps, draft_vocabulary=20)
        read, calls[keeps] = module._read, []
        module._read = lambda text, read=read, seen=calls[keeps]: seen.append(1) or read(text)
        quiet_trainer(6).fit(module, corpus())
        found[keeps] = weights(module)
        if keeps == "half_reads":
            assert {(part.states.dtype, part.log_q.dtype) for part in module._pool._reads.values()} == {
                (torch.bfloat16, torch.float16)
            }
    assert [len(calls[keeps]) for keeps in ("texts", "reads", "half_reads")] == [6, 2, 2]
    assert all(torch.equal(value, found["reads"][name]) for name, value in found["texts"].items())
    # numbers of two bytes round, so that weights are near and not the same
    near = [(found["half_reads"][name] - value).abs().max() for name, value in found["reads"].items()]
    assert 0 < max(near) < 0.05


def test_proposed_tokens_are_the_frequent_ones_and_resume(data, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"draft_vocabulary": 12, "pool": 2, "pool_keeps": "reads"}
    whole, resumed = build(data, **options), build(data, **options)
    quiet_trainer(4, callbacks=[keep], enable_checkpointing=True).fit(whole, data)
    rows = data.rows["train"].columns
    ids = rows["input_ids"][rows["attention_mask"] | rows["response_mask"]]
    counts = ids.bincount(minlength=len(data.tokenizer))
    chosen = whole.drafter.proposed
    assert len(chosen) == 12
    assert counts[chosen].min() >= counts[~torch.isin(torch.arange(len(counts)), chosen)].max()
    quiet_trainer(4).fit(resumed, corpus(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert torch.equal(resumed.drafter.proposed, chosen)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight)


@pytest.mark.parametrize(
    ("texts", "keeps", "batches"),
    [("data", "texts", 6), ("data", "reads", 2), ("target", "texts", 2), ("target", "reads", 2)],
)
def test_texts_of_the_data_are_kept_with_what_verifiers_make_of_them_alone(data, texts, keeps, batches):
    module, read = build(data, texts=texts, pool=2, pool_keeps=keeps), set()
    terms = module._terms
    module._terms = lambda text, *given: read.add(tuple(text.ids.flatten().tolist())) or terms(text, *given)
    quiet_trainer(6, limit_val_batches=0).fit(module, data)
    assert len(read) == batches
    assert len(module._pool.texts) == (2 if batches == 2 else 0)


def counting(data, batches, **options):
    """A module whose training rows are these."""
    module = build(data, **options)
    loader = SimpleNamespace(train_dataloader=lambda: batches)
    module._trainer = SimpleNamespace(datamodule=loader)
    return module


def test_prompts_and_responses_are_counted_and_padding_is_not(data):
    ids = torch.tensor([[5, 5, 5, 7, 8, 8], [5, 5, 5, 9, 8, 8]])
    prompt = torch.tensor([[False] * 3 + [True] + [False] * 2] * 2)
    response = torch.tensor([[False] * 4 + [True] * 2] * 2)
    rows = {"input_ids": ids, "attention_mask": prompt, "response_mask": response}
    assert counting(data, [rows], draft_vocabulary=3)._frequent_tokens().tolist() == [8, 7, 9]


def test_ranks_propose_the_frequent_tokens_of_all_rows(data, monkeypatch):
    """By hand: the other rank has read the token 6 five times."""

    def with_the_other(counts):
        counts[6] += 5

    mask = torch.ones(1, 4, dtype=torch.bool)
    rows = {"input_ids": torch.tensor([[7, 7, 7, 5]]), "attention_mask": mask, "response_mask": mask}
    module = counting(data, [rows], draft_vocabulary=2)
    assert module._frequent_tokens().tolist() == [7, 5]
    monkeypatch.setattr(ranks, "is_distributed", lambda: True)
    monkeypatch.setattr(ranks.dist, "all_reduce", with_the_other)
    assert module._frequent_tokens().tolist() == [6, 7]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_proposing_as_many_tokens_as_there_are_is_refused(data, tmp_path, extra):
    """One fewer trains, and its files read back; a head wider than the tokenizer does not hide the rest."""
    words = len(data.tokenizer)
    options = {"draft_length": 2, "window": 4, "rank": 4, "draft_vocabulary": words + extra}
    module = BlockDraftModule(network(data, 0, padding=3), **options)
    if extra >= 0:
        with pytest.raises(UsageError, match=rf"module\.draft_vocabulary={words + extra} .* the {words} tokens"):
            quiet_trainer(1).fit(module, data)
        return
    quiet_trainer(1).fit(module, data)
    again = load_drafter(module.export(tmp_path / "drafter"), module.verifiers)
    assert torch.equal(again.proposed, module.drafter.proposed)


def test_a_decoder_takes_the_length_that_the_options_say(data):
    for given, wanted in ((None, 3), (2, 2), ("auto", "auto")):
        module = build(data, gamma=given, costs="measured")
        module.end_ids = data.end_ids()
        decoder = module.decoder("block_drafter", data.response_length)
        assert (decoder.gamma, decoder.options.costs) == (wanted, "measured")
    out = decoder.decode(*prompts_of(prompted_rows(data.rows["test"][:4])), 8, TorchRandomSource(torch.Generator()))
    assert (out.lengths > 0).all()
    assert list(decoder._measured) == [4]


@pytest.mark.parametrize(("scheme", "gamma", "timed"), [("block_drafter", 2, True), ("naive", 2, False)])
def test_measured_costs_are_those_of_a_fixed_length_too(data, scheme, gamma, timed, monkeypatch):
    found = ForwardCosts(0.25, 0.125)
    monkeypatch.setattr("models.speculative.decoder.forward_costs", lambda *given, **more: found)
    module = build(data, gamma=gamma, costs="measured")
    module.end_ids = data.end_ids()
    drafting = module.decoder(scheme, data.response_length).draft_options(torch.ones(4, 2))
    assert ((drafting.cost, drafting.position_cost) == found) == timed


def test_every_micro_batch_has_texts_of_its_own_in_the_pool(data):
    module = build(data, pool=4)
    quiet_trainer(2, accumulate_grad_batches=2).fit(module, data)
    assert sorted(module._pool.texts) == [0, 1, 2, 3]
    assert len({tuple(rows["input_ids"].flatten().tolist()) for rows in module._pool.texts.values()}) == 4


def test_figures_of_decoding_have_the_same_names_whatever_was_drafted(data):
    module = build(data, draft_length=8)
    module.end_ids = data.end_ids()
    served = module._served(prompted_rows(data.rows["test"][:1]), torch.Generator().manual_seed(0))
    assert {name for name in served if name.startswith("served_") and name != "served_length"} == {
        f"served_{k}" for k in range(1, 9)
    }


def test_a_loaded_drafter_goes_where_the_models_go(data, tmp_path):
    folder = str(build(data).export(tmp_path / "drafter"))
    pair = QStarDecodingModule(network(data, 0), network(data, 1), schemes=("block_drafter",), drafter=folder)
    drafter = pair._block_drafter()
    pair.to("meta")
    assert drafter.fuse.weight.device.type == "cpu"  # the control: it is no part of the module
    pair.on_predict_start()
    assert {p.device.type for p in drafter.own_parameters().values()} == {"meta"}
    assert drafter.cos.device.type == "meta"


def test_exactness_under_shared_noise_is_a_g_test_alone(data, tmp_path):
    report = FrontierReport(str(tmp_path), "trial", {})
    options = {"schemes": ("naive", "ngram"), "verify": "shared_noise", "exactness_samples": 200, "alpha_points": 0}
    pair = QStarDecodingModule(network(data, 0), network(data, 1), **options)
    quiet_trainer(1, callbacks=[report]).test(pair, data, verbose=False)
    rows = [row for row in report.record["rows"] if row["decoder"].startswith("q*")]
    assert all(row["quality"]["g_test_p"] > 1e-3 for row in rows)
    assert all(row["quality"].get("max_enumeration_error") is None for row in rows)


def test_a_drafter_of_a_pair_and_adapters_are_refused_together(tmp_path):
    with pytest.raises(UsageError, match=r"module\.drafter was trained for .* leave one out"):
        QStarOptions(schemes=("block_drafter",), drafter=str(tmp_path), lora_rank=2)


@pytest.mark.parametrize("key", ["format", "options", "vocab_size", "state_layers", "verifiers"])
def test_a_description_without_a_key_is_named(data, tmp_path, key):
    folder = build(data).export(tmp_path / "drafter")
    path = folder / "drafter.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in known.items() if name != key}))
    with pytest.raises(UsageError, match=rf"drafter\.json (lacks|cannot be read \().*{key}"):
        read_drafter(folder)


def test_an_exported_drafter_answers_as_the_module_did(data, tmp_path):
    module = build(data)
    quiet_trainer(3).fit(module, data)
    folder = module.export(tmp_path / "drafter", data.tokenizer)
    again = build(data, lr=1.0)
    rows = prompted_rows(data.rows["test"][:8])
    texts = [
        decoder(rows, torch.Generator().manual_seed(1))
        for decoder in (module.decoder("block_drafter", data.response_length), again.answering(data, folder))
    ]
    assert torch.equal(*texts)
    assert load_drafter(folder, module.verifiers).options == module.drafter.options


def test_q_star_decoding_takes_a_saved_drafter(data, tmp_path):
    module = build(data)
    quiet_trainer(20).fit(module, data)
    folder = str(module.export(tmp_path / "drafter"))
    report = FrontierReport(str(tmp_path), "trial", {})
    options = {"schemes": ("block_drafter",), "drafter": folder, "exactness_samples": 500, "alpha_points": 0}
    pair = QStarDecodingModule(network(data, 0), network(data, 1), **options)
    quiet_trainer(1, callbacks=[report]).test(pair, data, verbose=False)
    row = {row["decoder"]: row for row in report.record["rows"]}["q*, blocks are drafted"]
    assert row["quality"]["g_test_p"] > 1e-3
    assert row["quality"]["max_enumeration_error"] < 1e-12
    assert 0 < row["cost"]["acceptance"] < 1
    with pytest.raises(UsageError, match="there is no drafter"):
        QStarDecodingModule(network(data, 0), network(data, 1), schemes=("block_drafter",))
    with pytest.raises(UsageError, match="holds no block drafter"):
        QStarDecodingModule(network(data, 0), network(data, 1), schemes=("block_drafter",), drafter=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dependence": "order"}, "module.dependence=order"),
        ({"schemes": ()}, "module.schemes is empty"),
        ({"schemes": ("theta",)}, "module.schemes=theta"),
        ({"texts": "judge"}, "module.texts=judge"),
        ({"decay": 0.0}, "module.decay=0.0"),
        ({"ce": 0.0, "tv": 0.0}, "trains nothing"),
        ({"temperature": 0.0}, "module.temperature=0.0"),
        ({"anchors": 0}, "module.anchors=0"),
        ({"draft_vocabulary": 0}, "module.draft_vocabulary=0"),
        ({"pool_keeps": "states"}, "module.pool_keeps=states"),
        ({"gamma": -1}, "module.gamma=-1"),
        ({"gamma": 4}, "module.gamma=4 is more than the 3 tokens of a draft; type module.gamma=3"),
        ({"costs": "guessed"}, "module.costs=guessed"),
    ],
)
def test_wrong_options_are_named(data, options, message):
    with pytest.raises(UsageError, match=message):
        build(data, **options)


def test_a_drafter_without_a_model_is_refused():
    with pytest.raises(UsageError, match="one causal model, or both"):
        BlockDraftModule()
