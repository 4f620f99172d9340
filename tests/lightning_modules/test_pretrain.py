"""Masked diffusion pre-training: the loss by hand, what may be hidden, and that a resumed run is the same run."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.trainer import quiet_trainer
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.ema import TrainableEMA
from datamodules.batch import TensorRows, pack_prompt_response
from lightning_modules.pretrain import PretrainModule
from models.diffusion.block_diffusion import BlockDiffusion
from models.diffusion.objective import MaskedDiffusion
from models.diffusion.sampler import generate_masked_diffusion
from models.flow.denoiser_objective import ContinuousDiffusion
from models.functional.errors import UsageError
from models.interfaces.masked_sampling import ReusedColumns
from models.objectives.masked_lm import MaskedLM

PAD, EOS, MASK = 0, 1, 2


def build(tiny_llada, data, objective=None, **options) -> PretrainModule:
    torch.manual_seed(0)
    ids = data.tokenizer
    model = tiny_llada(
        len(ids), mask_token_id=ids.mask_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    settings = {"lr": 1e-2, "warmup_steps": 1, "forwards": (1, 2), "seed": 7}
    module = PretrainModule(model, objective or MaskedDiffusion(), **(settings | options))
    module.log = lambda *_, **__: None
    return module


def ragged_batch() -> dict[str, torch.Tensor]:
    """Prompts of 1 to 5 tokens before 6 columns, responses of 0 to 4 tokens before 4: padding on both sides."""
    prompts = [[10 + n] * n for n in (1, 2, 5, 3)]
    responses = [[], [7], [8, 9, 7], [9, 8, 7, 6]]
    return pack_prompt_response(prompts, responses, prompt_length=6, response_length=4, pad_id=PAD, eos_id=EOS)


class Spy(torch.nn.Module):
    """Stands for a model: remembers the corrupted text that it was shown and answers with fixed logits."""

    mask_id = MASK

    def __init__(self, vocabulary: int = 20) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, vocabulary)
        self.seen: list[torch.Tensor] = []

    def embed(self, ids):
        self.seen.append(ids.clone())
        return self.table(ids)

    def hidden(self, embeds, attention_mask, response_mask=None):
        return embeds

    def lm_head(self, hidden):
        return hidden


# -- the loss --------------------------------------------------------------------------------------------------------


def loss_by_hand(model, batch: dict, generator: torch.Generator, maskable: torch.Tensor, eps: float) -> torch.Tensor:
    """Row by row and token by token: sum of -log softmax(logits)[x0] / p over hidden tokens, over the maskable ones."""
    x0 = batch["input_ids"]
    offset = torch.rand(1, generator=generator).item()
    chances = torch.rand(x0.shape, generator=generator)
    total = torch.zeros(())
    for row in range(len(x0)):
        t = (row / len(x0) + offset) % 1.0
        p = (1 - eps) * t + eps
        hidden = [k for k in range(x0.shape[1]) if maskable[row, k] and chances[row, k] < p]
        xt = x0[row].clone()
        xt[hidden] = MASK
        logits = model(xt.unsqueeze(0), batch["attention_mask"][row : row + 1])[0]
        for place in hidden:
            total = total - torch.log_softmax(logits[place], -1)[x0[row, place]] / p
    return total / maskable.sum()


@pytest.mark.parametrize(("form", "eps"), [("sft", 1e-3), ("sft", 0.2), ("pretrain", 1e-3)])
def test_loss_is_the_objective_by_hand(tiny_llada, tiny_oracle, form, eps):
    module = build(tiny_llada, tiny_oracle, MaskedDiffusion(form, eps=eps, random_length_probability=0.0))
    batch = next(iter(tiny_oracle.train_dataloader()))
    maskable = batch["response_mask" if form == "sft" else "attention_mask"]
    for split, stream in (("training", 0), ("validation", 1)):
        for batch_idx in (0, 3):
            generator = module.step_generator(batch_idx, stream)
            if form == "pretrain":
                torch.rand(1, generator=generator)  # whether to cut the batch
            ours = getattr(module, f"{split}_step")(batch, batch_idx)
            by_hand = loss_by_hand(module.model, batch, generator, maskable, eps)
            torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)
    losses = {module.training_step(batch, n).item() for n in (0, 1)} | {module.validation_step(batch, 0).item()}
    assert len(losses) == 3  # every step and every stream has draws of its own


def test_sft_never_hides_a_prompt_and_counts_the_response_with_its_end():
    batch, spy, objective = ragged_batch(), Spy(), MaskedDiffusion("sft")
    was_hidden = torch.zeros_like(batch["response_mask"])
    for seed in range(200):
        out = objective(spy, batch, torch.Generator().manual_seed(seed))
        xt = spy.seen.pop()
        assert torch.equal(xt[~batch["response_mask"]], batch["input_ids"][~batch["response_mask"]])
        assert out.tokens == 16
        assert out.position_nll.shape == xt.shape
        torch.testing.assert_close(out.loss, out.position_nll.sum() / out.tokens)
        assert torch.equal(out.position_nll != 0, xt == MASK)
        was_hidden |= xt == MASK
    assert torch.equal(was_hidden, batch["response_mask"])  # the trailing end-of-text is learnt as well


def test_pretrain_hides_everything_real_and_nothing_else():
    batch, spy = ragged_batch(), Spy()
    objective = MaskedDiffusion("pretrain", random_length_probability=0.0)
    was_hidden = torch.zeros_like(batch["attention_mask"])
    for seed in range(200):
        out = objective(spy, batch, torch.Generator().manual_seed(seed))
        was_hidden |= spy.seen.pop() == MASK
        assert out.tokens == int(batch["attention_mask"].sum()) == 27
    assert torch.equal(was_hidden, batch["attention_mask"])


def test_pretrain_cuts_to_any_length_as_often_as_asked():
    batch, spy = ragged_batch(), Spy()
    lengths = {}
    for probability in (0.0, 0.5, 1.0):
        objective = MaskedDiffusion("pretrain", random_length_probability=probability)
        lengths[probability] = []
        for seed in range(400):
            out = objective(spy, batch, torch.Generator().manual_seed(seed))
            length = spy.seen.pop().shape[1]
            assert out.tokens == int(batch["attention_mask"][:, :length].sum())
            lengths[probability].append(length)
    assert set(lengths[0.0]) == {10}
    assert set(lengths[1.0]) == set(range(1, 11))
    whole = {probability: sum(n == 10 for n in given) / 400 for probability, given in lengths.items()}
    assert abs(whole[1.0] - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 400)
    assert abs(whole[0.5] - 0.55) < 4 * math.sqrt(0.55 * 0.45 / 400)


def test_a_cut_that_leaves_only_padding_is_no_divergence(tiny_llada, tiny_oracle):
    """Prompts stand at the right of their columns: cut short, a batch can be padding alone. That is a step with no loss."""
    objective = MaskedDiffusion("pretrain", random_length_probability=1.0)
    module = build(tiny_llada, tiny_oracle, objective)
    batch = ragged_batch()
    batch = {name: column[:2] for name, column in batch.items()}  # four columns of padding in both rows
    lengths = []
    for batch_idx in range(30):
        generator = module.step_generator(batch_idx)
        torch.rand(1, generator=generator)
        lengths.append(int(torch.randint(1, 11, (1,), generator=generator)))
        assert torch.isfinite(module.training_step(batch, batch_idx))
    assert min(lengths) <= 4


def test_an_unknown_form_is_named():
    with pytest.raises(UsageError, match="form=causal is not known; type sft or pretrain"):
        MaskedDiffusion("causal")


# -- likelihood ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sft", "pretrain"])
def test_the_bound_and_the_truth_cover_the_same_tokens(tiny_llada, tiny_oracle, form):
    """The response given the prompt, in both forms: a model whose logits are all alike needs ln V nats for each token."""
    module = build(tiny_llada, tiny_oracle, MaskedDiffusion(form, random_length_probability=0.5))
    del module.log
    torch.nn.init.zeros_(module.model.lm_head.weight)
    columns = tiny_oracle.rows["val"].columns
    many = {name: column[torch.arange(len(column)).repeat(8)] for name, column in columns.items()}
    tiny_oracle.rows["val"] = TensorRows(many)
    (found,) = quiet_trainer(1).validate(module, tiny_oracle, verbose=False)
    tokens = int(many["response_mask"].sum())
    assert module.meter.tokens == module.truth_meter.tokens == tokens
    assert found["val/nll_truth"] == pytest.approx(tiny_oracle.true_nll(many).sum().item() / tokens)
    if form == "pretrain":  # of random orders; the loss of sft is a draw of it
        assert found["val/nll_bound"] == pytest.approx(math.log(len(tiny_oracle.tokenizer)), rel=1e-5)


def test_the_loss_is_the_likelihood_of_packed_rows_and_of_responses():
    rows, packed = ragged_batch(), {"labels": torch.zeros(1, 4)}
    assert [MaskedDiffusion("sft").loss_is_nll(batch) for batch in (rows, packed)] == [True, True]
    assert [MaskedDiffusion("pretrain").loss_is_nll(batch) for batch in (rows, packed)] == [False, True]


# -- steps -----------------------------------------------------------------------------------------------------------


class Recorder(Callback):
    """Loss of every batch and gradient of every step."""

    def __init__(self) -> None:
        self.losses, self.gradients = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_) -> None:
        self.losses.append(outputs["loss"].item())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.requires_grad})


def test_two_half_batches_make_one_step_of_the_whole(tiny_llada, tiny_oracle):
    """The gradient is that of sum / count over both halves, each with its own draws."""
    tiny_oracle.batch_size = 4
    halves = [batch for batch, _ in zip(tiny_oracle.train_dataloader(), range(2), strict=False)]
    module, seen = build(tiny_llada, tiny_oracle), Recorder()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    del module.log
    quiet_trainer(1, callbacks=[seen], accumulate_grad_batches=2).fit(module, tiny_oracle)
    assert len(seen.losses) == 2
    assert len(seen.gradients) == 1

    twin = build(tiny_llada, tiny_oracle)
    assert all(torch.equal(p, before[name]) for name, p in twin.named_parameters())
    outs = [twin.objective(twin.model, half, twin.step_generator(n)) for n, half in enumerate(halves)]
    for loss, out in zip(seen.losses, outs, strict=True):
        assert loss == pytest.approx(out.loss.item() / 2, rel=1e-5)
    (sum(out.loss * out.tokens for out in outs) / sum(out.tokens for out in outs)).backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(seen.gradients[0][name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_tiny_model_learns_one_text_by_heart(tiny_llada, tiny_oracle):
    rows = tiny_oracle.rows["train"].columns
    tiny_oracle.rows["train"] = TensorRows({name: column[:1].repeat_interleave(64, 0) for name, column in rows.items()})
    module, seen = build(tiny_llada, tiny_oracle, warmup_steps=5), Recorder()
    del module.log
    quiet_trainer(120, callbacks=[seen]).fit(module, tiny_oracle)
    assert sum(seen.losses[-10:]) < sum(seen.losses[:10]) / 10
    few = {name: column[:8] for name, column in tiny_oracle.rows["train"].columns.items()}
    text = few["input_ids"][few["response_mask"]].view(8, -1)

    def share(model, **options) -> float:
        """Share of right tokens when one token is decided at each forward."""
        draw = torch.Generator().manual_seed(0)
        return (generate_masked_diffusion(model, few, draw, steps=text.shape[1], **options) == text).double().mean()

    assert share(module.model, temperature=0.0, remasking="low_confidence") == 1.0
    assert share(module.model, temperature=1.0, remasking="random") > 0.95
    assert share(build(tiny_llada, tiny_oracle).model, temperature=0.0, remasking="low_confidence") < 0.5


def _checkpointing(tmp_path) -> dict:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    return {"callbacks": [checkpoint, TrainableEMA(0.9)], "enable_checkpointing": True, "val_check_interval": 4}


OBJECTIVES = {
    "sft": MaskedDiffusion,
    "pretrain": lambda: MaskedDiffusion("pretrain", random_length_probability=0.3),
    "masked_lm": MaskedLM,
    "blocks": lambda: BlockDiffusion(2),
    "continuous": ContinuousDiffusion,
}


@pytest.mark.parametrize(
    ("objective", "stop"),
    [*itertools.product(("sft", "pretrain"), (3, 8, 11)), ("masked_lm", 11), ("blocks", 11), ("continuous", 11)],
)
def test_resume_gives_the_same_losses_and_weights_as_an_uninterrupted_run(
    tiny_llada, tiny_oracle, tmp_path, stop, objective
):
    """8 batches an epoch: stop in the middle of the first, at its end, and in the second."""

    def module():
        made = build(tiny_llada, tiny_oracle, OBJECTIVES[objective]())
        del made.log
        return made

    whole, losses = module(), Recorder()
    options = _checkpointing(tmp_path)
    quiet_trainer(14, **(options | {"callbacks": [*options["callbacks"], losses]})).fit(whole, tiny_oracle)

    resumed, again = module(), Recorder()
    trainer = quiet_trainer(14, callbacks=[TrainableEMA(0.9), again], val_check_interval=4)
    trainer.fit(resumed, tiny_oracle, ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True)
    assert again.losses == losses.losses[stop:]
    for name, p in resumed.named_parameters():
        assert torch.equal(p, dict(whole.named_parameters())[name]), name

    other = module()
    other.seed += 1
    changed = Recorder()
    quiet_trainer(14, callbacks=[changed]).fit(
        other, tiny_oracle, ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True
    )
    assert changed.losses != losses.losses[stop:]  # the draws, not only the rows, had to be the same


def test_a_checkpoint_is_plain_and_comes_back(tiny_llada, tiny_oracle, tmp_path):
    module = build(tiny_llada, tiny_oracle)
    del module.log
    quiet_trainer(2, **_checkpointing(tmp_path)).fit(module, tiny_oracle)
    held = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert set(held["state_dict"]) == {name for name, _ in module.named_parameters()}
    assert held["hyper_parameters"]["lr"] == 1e-2
    assert not {"model", "objective"} & set(held["hyper_parameters"])
    wider = build(lambda *a, **k: tiny_llada(*a, **(k | {"hidden_size": 24})), tiny_oracle)
    del wider.log
    with pytest.raises(UsageError, match="shape"):
        quiet_trainer(4).fit(wider, tiny_oracle, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)


def test_its_decoders_are_its_model_at_every_number_of_forwards(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle, forwards=[1, 3], temperature=0.0, remasking="low_confidence")
    decoders = module.decoders()
    assert [(d.method, d.name, d.forwards) for d in decoders] == [
        ("teacher", "teacher, greedy", 1),
        ("teacher", "teacher, greedy", 3),
    ]
    rows = tiny_oracle.rows["test"].columns
    for decoder, steps in zip(decoders, (1, 3), strict=True):
        expected = generate_masked_diffusion(
            module.model, rows, torch.Generator(), steps=steps, temperature=0.0, remasking="low_confidence"
        )
        assert torch.equal(decoder(rows, torch.Generator()), expected)


def test_further_temperatures_and_the_temperature_of_rules_have_rows_of_their_own(tiny_llada, tiny_oracle, monkeypatch):
    monkeypatch.setattr(PretrainModule, "trainer", SimpleNamespace(datamodule=tiny_oracle))
    options = {"forwards": [1, 3], "temperature": 1.0, "temperatures": [0.5]}
    module = build(tiny_llada, tiny_oracle, **options, commit_rules={"factor": [1.0]}, rule_temperature=1.0)
    *scheduled, rule = module.decoders()
    assert [(d.name, d.forwards) for d in scheduled] == [
        ("teacher, sampled", 1), ("teacher, sampled", 3), ("teacher, sampled at 0.5", 1), ("teacher, sampled at 0.5", 3),
    ]  # fmt: skip
    assert rule.name == "teacher, factor 1, sampled"
    rows = tiny_oracle.rows["test"].columns
    texts = [rule(rows, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert not torch.equal(*texts)  # drawn, not the most probable
    expected = generate_masked_diffusion(module.model, rows, torch.Generator().manual_seed(0), steps=3, temperature=0.5)
    assert torch.equal(scheduled[3](rows, torch.Generator().manual_seed(0)), expected)
    with pytest.raises(UsageError, match=r"module\.rule_temperature=-1 must be at least 0"):
        build(tiny_llada, tiny_oracle, rule_temperature=-1)


def test_a_model_in_blocks_is_compared_where_its_blocks_allow_it(tiny_llada, tiny_oracle):
    """Three blocks of two tokens: numbers of forward passes that are multiples of three, else one pass a block."""
    for forwards, wanted in (([1, 2, 3, 4, 6], [3, 6]), ([1, 2], [3])):
        module = build(tiny_llada, tiny_oracle, BlockDiffusion(2), forwards=forwards)
        assert module.compared_forwards(tiny_oracle) == wanted
    whole = build(tiny_llada, tiny_oracle, BlockDiffusion(None), forwards=[1, 4])
    assert whole.compared_forwards(tiny_oracle) == [1, 4]
    rows = tiny_oracle.rows["test"].columns
    decoder = module.decoder(tiny_oracle, 3, 0.0)
    expected = generate_masked_diffusion(
        module.model, rows, torch.Generator().manual_seed(0), steps=3, temperature=0.0, block_length=2
    )
    assert torch.equal(decoder(rows, torch.Generator().manual_seed(0)), expected)
    with pytest.raises(UsageError, match=r"block_length=3: .* type module.block_length=null"):
        build(tiny_llada, tiny_oracle, BlockDiffusion(2), block_length=3)


def test_a_cache_reaches_every_row_of_the_table(tiny_llada, tiny_oracle):
    options = {"cache": "dual", "cache_refresh": 2, "block_length": 3, "commit_rules": {"confidence": [0.9]}}
    module = build(tiny_llada, tiny_oracle, forwards=[2], **options)
    module._trainer = SimpleNamespace(datamodule=tiny_oracle)
    assert [decoder.options["reused"] for decoder in module.decoders()] == [ReusedColumns("dual", 2)] * 2
