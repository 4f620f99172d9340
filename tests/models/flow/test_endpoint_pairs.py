"""Pairs of noise and text, and intervals of the flow from one to the other."""

from collections import Counter

import pytest
import torch
from helpers.noisy_mask import build, perturb
from helpers.trainer import quiet_trainer
from scipy.stats import chisquare

from datamodules.oracle.datamodule import OracleDataModule
from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule
from models.flow.endpoint_pairs import EndpointPairs
from models.flow.flow_intervals import EMPTY_SHARE, FlowIntervals
from models.flow.losses import match_intervals
from models.flow.solver import NoisyMaskDecoder, follow_flow


def followed(tiny_llada, tiny_oracle, forwards=8):
    """A flow with its steps, its intervals and where it ends."""
    student = build(tiny_llada, tiny_oracle)
    perturb(student)
    student = student.student
    batch = next(iter(tiny_oracle.train_dataloader()))
    start, steps = student.path.start_sample(batch, torch.Generator().manual_seed(1)), []
    intervals = FlowIntervals(start, len(start.z) - 2, forwards, (1, 2, 4), torch.Generator().manual_seed(2))

    def on_step(step):
        steps.append(step)
        intervals(step)

    tokens = follow_flow(student.path, student, start, forwards=forwards, step="ode", on_step=on_step)
    return student, steps, intervals, tokens


def test_an_interval_s_psi_jumps_to_the_point_that_the_flow_reached(tiny_llada, tiny_oracle):
    """X_{s,t}(z_s) with an interval's ψ is the point after all its steps; with the plain mean of their ψ it is not."""
    student, steps, intervals, tokens = followed(tiny_llada, tiny_oracle)
    begin, t, psi = intervals.result
    z, masked, s = begin.z, begin.masked, begin.s
    assert len(z) == len(tokens) - 2
    psi_of_steps = torch.stack([step.psi for step in steps])
    for n, (first, last) in enumerate(zip(intervals.first.tolist(), intervals.last.tolist(), strict=True)):
        here = (intervals.row == n).nonzero().squeeze(-1)
        one = slice(n, n + 1)
        assert torch.equal(z[n], steps[first].sample.z[n])
        assert s[n] == steps[first].sample.s
        assert t[n] == (steps[last].sample.s if last < len(steps) else 1.0)
        if last == first:
            assert torch.equal(psi[here], steps[first].d[here])
        elif last == len(steps):
            words = torch.nn.functional.one_hot(tokens[n][masked[n]], psi.shape[-1])
            assert torch.equal(psi[here], words.float())
        else:
            end = student.path.move(begin.rows(one), psi[here], t[one])
            torch.testing.assert_close(end.z[0], steps[last].sample.z[n], atol=1e-5, rtol=0)
            if last - first > 2:
                mean = student.path.move(begin.rows(one), psi_of_steps[first:last, here].mean(0), t[one])
                assert (mean.z[0] - steps[last].sample.z[n]).abs().max() > 1e-4
    torch.testing.assert_close(psi.sum(-1), torch.ones(len(psi)))
    assert psi.min() >= 0


def test_intervals_are_the_jumps_of_the_chains_each_chain_as_often(tiny_llada, tiny_oracle):
    path, batch = build(tiny_llada, tiny_oracle).student.path, next(iter(tiny_oracle.train_dataloader()))
    start = path.start_sample(batch, torch.Generator()).rows(torch.zeros(8000, dtype=torch.long))
    intervals = FlowIntervals(start, 8000, 8, (2, 4), torch.Generator().manual_seed(0))
    seen = Counter(zip(intervals.first.tolist(), intervals.last.tolist(), strict=True))
    jumps = {(0, 4): 1 / 4, (4, 8): 1 / 4} | {(k, k + 2): 1 / 8 for k in range(0, 8, 2)}
    points = {(0, 0): 3 / 8, (4, 4): 3 / 8, (2, 2): 1 / 8, (6, 6): 1 / 8}
    wanted = {cell: p * (1 - EMPTY_SHARE) for cell, p in jumps.items()} | {
        cell: p * EMPTY_SHARE for cell, p in points.items()
    }
    assert seen.keys() == wanted.keys()
    assert chisquare([seen[cell] for cell in wanted], [8000 * p for p in wanted.values()]).pvalue > 1e-3
    # the control: jumps of any length would not fit
    assert chisquare([seen[cell] for cell in wanted], [8000 / len(wanted)] * len(wanted)).pvalue < 1e-6


def test_only_jumps_that_the_flow_s_grid_has_are_learned(tiny_llada, tiny_oracle):
    assert build(tiny_llada, tiny_oracle, ode_steps=8, student_forwards=(1, 2, 3, 4)).pairs.chains == (2, 4)
    assert build(tiny_llada, tiny_oracle, ode_steps=8, student_forwards=(1, 3)).pairs.chains == (8,)


def test_re_noised_answers_jump_to_the_text_from_everywhere(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle, few_step="renoise", student_forwards=(1, 2, 4))
    assert module.pairs.few_step == "renoise"
    start = module.student.path.start_sample(next(iter(tiny_oracle.train_dataloader())), torch.Generator())
    intervals = FlowIntervals(start, len(start.z), 4, (2, 4), torch.Generator().manual_seed(0), "renoise")
    assert ((intervals.last == 4) | (intervals.last == intervals.first)).all()
    assert (intervals.first > 0).any()


def test_refined_answers_jump_from_noise_to_the_text_alone(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle, few_step="refine", student_forwards=(1, 2, 4))
    start = module.student.path.start_sample(next(iter(tiny_oracle.train_dataloader())), torch.Generator())
    draw = torch.Generator().manual_seed(0)
    intervals = FlowIntervals(start, len(start.z), module.pairs.ode_steps, module.pairs.chains, draw, "refine")
    whole = (intervals.first == 0) & (intervals.last == module.pairs.ode_steps)
    assert (whole | (intervals.last == intervals.first)).all()
    assert whole.any()


def test_the_loss_of_intervals_is_least_at_the_flow_s_own_psi(tiny_llada, tiny_oracle):
    student, _, intervals, _ = followed(tiny_llada, tiny_oracle)
    found = intervals.result
    with torch.no_grad():
        own = student(found.begin, found.t).softmax(-1)
    gap = match_intervals(student, found._replace(psi=own)).loss
    assert abs(gap) < 1e-6
    other = match_intervals(student, found)
    assert other.loss > 1e-3
    other.loss.backward()
    assert all(p.grad is not None for p in student.body.parameters() if p.requires_grad)


def test_pairs_are_the_ends_of_their_own_noise_and_are_used_again(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle)
    perturb(module)
    student, batches = module.student, iter(tiny_oracle.train_dataloader())
    pairs = EndpointPairs(ode_steps=3, reuse=2, window=2, observed_share=0.5)
    draw, given = torch.Generator().manual_seed(0), 0
    for _ in range(6):
        batch = next(batches)
        pair, intervals = pairs.draw(student.path, student, batch, draw)
        assert intervals is None  # none were asked for
        end = follow_flow(student.path, student, pair, forwards=3, step="ode")
        assert torch.equal(end[pair.masked], pair.x0[pair.masked])
        given += int((pair.masked.sum(-1) < tiny_oracle.response_length).sum())
    assert len(pairs.pool) == 2
    assert given > 0  # rows with a part of the response that stays
    control, batch = EndpointPairs(coupling="independent"), next(batches)
    drawn, intervals = control.draw(student.path, student, batch, draw, 5)
    assert intervals is None
    assert torch.equal(drawn.x0, batch["input_ids"])
    assert torch.equal(drawn.masked, batch["response_mask"])


@pytest.mark.slow
def test_coupled_noise_decides_the_text_and_independent_noise_is_ignored(tiny_llada):
    """The control: where noise is independent of the text, one forward pass gives hardly more than one text."""
    sizes = {"train_rows": 2048, "val_rows": 16, "test_rows": 512, "batch_size": 64, "eval_batch_size": 512}
    data = OracleDataModule(size="tiny", reveal_all=0, reveal_part=0, **sizes)
    data.setup()
    rows, entropy = data.rows["test"].columns, {}
    lr = {"lr": 5e-3}
    stages = {"adapt": {"share": 0.5, **lr}, "flow": {"share": 0, **lr}, "polish": {"share": 0.5, **lr}}
    for coupling in ("flow", "independent"):
        options = {
            "stages": stages,
            "ode_steps": 8,
            "interval_share": 0.0,
            "observed_share": 0.0,
            "teacher_weight": 0.0,
            "optimizer": "adamw",
        }
        ids = data.tokenizer
        torch.manual_seed(0)
        teacher = tiny_llada(
            len(ids),
            mask_token_id=ids.mask_token_id,
            eos_token_id=1,
            pad_token_id=0,
            hidden_size=32,
            intermediate_size=64,
        )
        module = NoisyMaskFlowModule(
            teacher, coupling=coupling, sigma=3.0, prompt_length=2, prompt_hidden_size=16, prompt_rank=4, **options
        )
        quiet_trainer(300).fit(module, data)
        texts = NoisyMaskDecoder(module.student, 1)(rows, torch.Generator().manual_seed(0))
        entropy[coupling] = data.scorer(rows, texts).entropy
    truth = data.distribution.entropy(rows["reveal"][:1]).item()
    assert entropy["flow"] > 0.6 * truth
    assert entropy["independent"] < 0.5 * truth


def test_intervals_are_learned_in_the_steps_that_make_pairs(tiny_llada, tiny_oracle):
    """There a quarter of the rows learns them, and the loss is the mean over rows; the other steps have endpoints alone."""
    module = build(tiny_llada, tiny_oracle, pair_reuse=3, interval_share=0.25)
    perturb(module)
    module.denoiser = module.student.trainable()
    batch, draw = next(iter(tiny_oracle.train_dataloader())), torch.Generator().manual_seed(0)
    terms = [module.stage_terms("polish", batch, 0.0, draw) for _ in range(5)]
    gaps = [step.raw.get("interval_gap") for step in terms]
    assert [gap is not None for gap in gaps] == [True, False, False, True, False]
    for step, gap in zip(terms, gaps, strict=True):
        endpoint = step.raw["endpoint_nll"]
        torch.testing.assert_close(step.loss, endpoint if gap is None else 0.75 * endpoint + 0.25 * gap)
