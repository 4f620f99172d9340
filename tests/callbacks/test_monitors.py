"""Every monitor on a module of which the figures are known, on a real planner-executor, on a flow and on a pair of models."""

import math
import re

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.concept import DRAWN, TYPES
from helpers.monitors import SixRows, Watched
from helpers.trainer import quiet_trainer
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.monitors.dashboard import Dashboard
from callbacks.monitors.exchange import ExchangeMonitor
from callbacks.monitors.flips import FlipMonitor
from callbacks.monitors.gradient import GradientMonitor
from callbacks.monitors.margin import MarginMonitor
from callbacks.monitors.positions import PositionMonitor
from callbacks.monitors.relaxation import RelaxationMonitor
from callbacks.monitors.sharpness import SharpnessMonitor
from callbacks.monitors.staleness import StalenessMonitor
from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule
from lightning_modules.qstar_decoding import QStarDecodingModule
from reporting.health_rules import RULES

STAGES = {"adapt": {"share": 0.5, "lr": 1e-3}, "flow": {"share": 0.5, "lr": 1e-3}}


def seen(module, data, *monitors, steps: int = 2, **options) -> dict[str, float]:
    trainer = quiet_trainer(steps, callbacks=list(monitors), val_check_interval=steps, **options)
    trainer.fit(module, data)
    found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("monitor/")}
    return {name.removeprefix("monitor/"): value for name, value in found.items()}


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_exchange_by_hand():
    found = seen(Watched(), SixRows(), ExchangeMonitor(width=3))
    assert found["nll_own_condition"] == 1
    # the nearest number is one away, whoever it is; a blank plan is ten away
    assert found["dnll_nearest"] == pytest.approx(1)
    assert found["dnll_blank"] == pytest.approx(10)
    assert "dnll_random" not in found  # the module has no such thing
    assert found["dnll_shuffle"] >= 1
    assert found["dnll_shuffle_low"] < found["dnll_shuffle"] < found["dnll_shuffle_high"]
    assert {"dnll_shuffle_at_0", "dnll_shuffle_at_3", "dnll_shuffle_at_0_low", "dnll_shuffle_at_3_high"} <= found.keys()


def test_a_condition_that_is_ignored_costs_nothing_to_exchange():
    found = seen(Watched(used=0.0), SixRows(), ExchangeMonitor())
    assert [found[f"dnll_{kind}"] for kind in ("shuffle", "blank", "nearest")] == [0, 0, 0]


def test_a_condition_that_only_opens_the_text_shows_it_by_position():
    found = seen(Watched(reach=2), SixRows(), ExchangeMonitor(width=2))
    assert found["dnll_shuffle_at_0"] > 1
    assert found["dnll_shuffle_at_2"] == 0


def test_the_shuffle_is_printed_by_position_with_its_interval():
    figures = {"dnll_shuffle": 1.5, "dnll_shuffle_low": 1.0, "dnll_shuffle_high": 2.0, "dnll_random": 9.0}
    printed = ExchangeMonitor.in_words(figures | {"dnll_shuffle_at_0": -0.25})
    assert printed.endswith("(95 % interval): all: +1.500 [+1.000, +2.000], from 0: -0.250")


def test_nll_by_position_counts_tokens_that_count():
    class Rising(Watched):
        def nll(self, rows, batch):  # position + number of the row
            return torch.arange(4) + batch.text[:, :1].float()

    found = seen(Rising(), SixRows(), PositionMonitor(width=3))
    assert found == pytest.approx(
        {"nll_at_0": 1 + 2.5, "nll_at_3": 3 + 2}
    )  # the last position counts in rows 0, 2 and 4


def test_sharpness_by_hand():
    found = seen(Watched(), SixRows(), SharpnessMonitor())
    of_mean = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert found == pytest.approx(
        {
            "planner_entropy": math.log(2) / 2,
            "planner_max_prob": 0.75,
            "planner_entropy_share": 0.5,
            "planner_usage": of_mean / math.log(2),
        }
    )


def test_relaxation_and_gradient_by_hand():
    found = seen(Watched(), SixRows(), RelaxationMonitor(), GradientMonitor())
    angles = torch.arange(8.0) / 10
    assert found["relaxation_cosine"] == pytest.approx(angles.cos().mean().item())
    assert found["relaxation_distance"] == pytest.approx((2 * (angles / 2).sin()).mean().item(), rel=1e-5)
    # the slope of plan_head is the mean of the batch: 1.5, then 5.5
    assert found["planner_gradient"] == pytest.approx(3.5)
    assert found["planner_gradient_max"] == pytest.approx(5.5)


def test_searches_by_hand():
    found = seen(Watched(), SixRows(), MarginMonitor(), FlipMonitor(), StalenessMonitor(), steps=4)
    # searched were rows 0 to 3 and 8 to 11, the last of which had one candidate; 0, 3 and 9 had a plan before, 0 another one
    assert found["margin"] == pytest.approx((6 + 27) / 70)
    assert found["plan_flips"] == pytest.approx(1 / 3)
    assert found["staleness"] == pytest.approx(0.5 / 3)


def test_a_module_that_offers_nothing_is_passed_over():
    class Bare(LightningModule):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.head(batch).mean()

        def validation_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    monitors = [ExchangeMonitor(), PositionMonitor(), SharpnessMonitor(), RelaxationMonitor(), GradientMonitor()]
    assert seen(Bare(), SixRows(), *monitors, MarginMonitor(), FlipMonitor(), StalenessMonitor()) == {}


def test_a_module_that_never_searched_has_no_figures_of_it():
    module = Watched()
    module.search = lambda batch: None
    assert seen(module, SixRows(), MarginMonitor(), FlipMonitor(), StalenessMonitor()) == {}


# -- state -----------------------------------------------------------------------------------------------------------


def test_resumed_in_the_middle_of_a_window_is_uninterrupted(tmp_path):
    def monitors():
        return [MarginMonitor(), FlipMonitor(), StalenessMonitor(), RelaxationMonitor(), GradientMonitor()]

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = seen(Watched(), SixRows(), *monitors(), keep, steps=5, enable_checkpointing=True)
    trainer = quiet_trainer(5, callbacks=monitors(), val_check_interval=5)

    class Rest(SixRows):
        def train_dataloader(self):  # what an exact loader would hand out from step 3 on
            return torch.utils.data.DataLoader(torch.arange(12.0, 64.0).unsqueeze(-1), batch_size=4)

    module = Watched()
    trainer.fit(module, Rest(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    resumed = {name.removeprefix("monitor/"): v.item() for name, v in trainer.callback_metrics.items()}
    assert resumed["planner_gradient"] == pytest.approx(whole["planner_gradient"])
    assert resumed["planner_gradient_max"] == whole["planner_gradient_max"]
    assert resumed["relaxation_cosine"] == pytest.approx(whole["relaxation_cosine"])
    assert resumed["margin"] == pytest.approx(whole["margin"])


def test_a_window_begins_anew_after_each_validation():
    class Each(Callback):
        def __init__(self):
            self.found = []

        def on_validation_end(self, trainer, pl_module):
            self.found.append(trainer.callback_metrics["monitor/planner_gradient"].item())

    quiet_trainer(4, callbacks=[GradientMonitor(), each := Each()], val_check_interval=2).fit(Watched(), SixRows())
    assert each.found == pytest.approx([3.5, (9.5 + 13.5) / 2])


# -- the modules of this project ---------------------------------------------------------------------------------------


def concept_module(data, **options) -> ConceptPlannerExecutorModule:
    torch.manual_seed(0)
    ids = data.special_ids()
    model = tiny_causal(ids.pop("vocab_size"), **ids)
    wanted = {"types": TYPES, "weights": {"text": 1.0, "planner": 1.0}, "warmup_steps": 1, "lr": 3e-3} | DRAWN
    return ConceptPlannerExecutorModule(model, **wanted | options)


def test_a_planner_executor_offers_what_plans_have(tiny_oracle):
    monitors = [
        ExchangeMonitor(width=3),
        PositionMonitor(width=3),
        SharpnessMonitor(),
        RelaxationMonitor(),
        GradientMonitor(),
    ]
    found = seen(concept_module(tiny_oracle), tiny_oracle, *monitors)
    kinds = {f"dnll_{kind}" for kind in ("shuffle", "blank", "random", "nearest")}
    assert kinds | {"nll_at_0", "nll_at_3", "posterior_entropy", "prior_max_prob", "relaxation_cosine"} <= found.keys()
    assert found["planner_gradient"] > 0
    assert 0 < found["relaxation_cosine"] <= 1


@pytest.mark.parametrize("sampler", ["gumbel_st", "fsq", "ema_vq"])
@pytest.mark.parametrize("reached", [True, False])
def test_the_rule_fires_where_the_text_does_not_train_the_posterior(tiny_oracle, sampler, reached):
    """The prior learns, and usage and commitment move the posterior, in both runs."""
    weights = {"text": 1.0, "planner": 1.0, "usage": 1.0, "commitment": 0.25}
    types = {"a": {"codes": 8}, "b": {"codes": 8}}
    module = concept_module(tiny_oracle, sampler=sampler, types=types, weights=weights, quantise=(0, 0.5))
    if not reached:
        read = module.executor.logits
        module.executor.logits = lambda ids, embeds, *rest: read(ids, embeds.detach(), *rest)
    assert_rule_fires(seen(module, tiny_oracle, GradientMonitor()), not reached)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_rule_fires_where_searched_plans_do_not_train_the_posterior(tiny_oracle, weight):
    weights = {"text": 1.0, "planner": 1.0, "posterior": weight}
    module = concept_module(tiny_oracle, search={"begin": 0.0, "candidates": 1}, weights=weights)
    assert_rule_fires(seen(module, tiny_oracle, GradientMonitor()), weight == 0)


def assert_rule_fires(found: dict[str, float], expected: bool) -> None:
    (rule,) = (rule for rule in RULES if rule.name == "the planner gets no gradient")
    looks = [found | {"progress": share} for share in (0.5, 1.0)]
    assert (rule.evidence(looks) is not None) == expected


def test_the_record_of_a_test_has_them(tiny_oracle):
    module = concept_module(tiny_oracle)
    quiet_trainer(1, callbacks=[ExchangeMonitor(width=3), SharpnessMonitor()]).test(module, tiny_oracle, verbose=False)
    figures = module.model_figures()
    assert figures.keys() >= {
        "dnll_shuffle",
        "dnll_shuffle_low",
        "dnll_shuffle_at_0_high",
        "prior_entropy",
        "nll_bound",
    }


def test_hidden_concepts_are_not_there_and_random_ones_keep_the_length(tiny_oracle):
    """A plan of which nothing is seen gives all texts of its shape the same logits; one of which all is seen is the plan."""
    module = concept_module(tiny_oracle, types={"a": {"codes": 3, "most": 2}, "b": {"codes": 4, "most": 1}}).eval()
    probe, rows = module.probe, {name: column[:8] for name, column in tiny_oracle.rows["val"].columns.items()}
    probe.tokenizer = tiny_oracle.tokenizer
    with torch.no_grad():
        batch = probe.probe_batch(rows, torch.Generator())
        text = batch.text[:1].expand(8, -1)
        blank = batch.under(probe.corrupt_condition(batch, "blank", torch.Generator()))
        logits = module.executor.logits(*probe.block(blank), text)
        torch.testing.assert_close(logits, logits[:1].expand_as(logits))
        seen_all = module.executor.logits(*probe.block(batch), text)
        whole = module.planner.block(batch.condition["choices"])
        torch.testing.assert_close(seen_all, module.executor.logits(*whole, text))
    other = probe.corrupt_condition(batch, "random", torch.Generator().manual_seed(0))["choices"]
    choices = batch.condition["choices"]
    assert (other != choices).any()
    assert torch.equal(other == 0, choices == 0)
    assert ((other >= 1) & (other <= torch.tensor([3, 3, 4]))).all()


def test_a_flow_whose_noise_is_ignored_shows_it_and_one_that_reads_it_too(tiny_llada, tiny_oracle):
    def module(**options):
        torch.manual_seed(0)
        teacher = tiny_llada(len(tiny_oracle.tokenizer), mask_token_id=2, eos_token_id=1, pad_token_id=0)
        sizes = {"prompt_length": 3, "prompt_hidden_size": 8, "prompt_rank": 4}
        return NoisyMaskFlowModule(teacher, stages=STAGES, **sizes, **options)

    monitors = [ExchangeMonitor(width=3), SharpnessMonitor(), PositionMonitor(width=3)]
    shut = seen(module(), tiny_oracle, *monitors)
    assert abs(shut["dnll_shuffle"]) < 0.01
    assert {"student_entropy", "nll_at_0", "dnll_nearest", "dnll_random", "dnll_blank"} <= shut.keys()
    assert seen(module(adapter="prefix"), tiny_oracle, *monitors)["dnll_shuffle"] > 0.1


def test_a_pair_shows_the_use_of_the_prompt(tiny_oracle):
    ids = tiny_oracle.special_ids()
    models = [tiny_causal(ids["vocab_size"]) for _ in range(2)]
    for model in models:
        for weight in model.parameters():
            if weight.ndim >= 2:
                torch.nn.init.normal_(weight, std=0.4)
    module = QStarDecodingModule(*models, schemes=("naive",), exactness_samples=0)
    found = seen(module, tiny_oracle, ExchangeMonitor(width=3), PositionMonitor(width=3), SharpnessMonitor(), steps=1)
    assert abs(found["dnll_shuffle"]) > 1e-4
    assert "dnll_blank" not in found
    rows = tiny_oracle.rows["val"].columns
    (probe,) = module.probes
    batch = probe.probe_batch(rows, torch.Generator())
    with torch.no_grad():
        ours = probe.nll(rows, batch)
        theirs = module._nll(rows, batch.text)[0]
    torch.testing.assert_close(ours[batch.counts], theirs)
    assert found["nll_at_0"] == pytest.approx(ours[:, :3][batch.counts[:, :3]].mean().item(), rel=1e-4)


# -- dashboard -------------------------------------------------------------------------------------------------------


def test_all_charts_stand_on_one_page(tmp_path):
    written = {}

    class Logger(TensorBoardLogger):
        def __init__(self):
            super().__init__(tmp_path)
            self.experiment.add_custom_scalars = lambda layout: written.update(layout)

    monitors = [ExchangeMonitor(), MarginMonitor(), FlipMonitor(), StalenessMonitor(), Dashboard()]
    found = seen(Watched(), SixRows(), *monitors, logger=Logger())
    for _, charted in written["monitors"].values():
        assert any(re.search(tag, f"monitor/{name}") for name in found for tag in charted)
    kind, tags = written["monitors"]["search for plans"]
    assert kind == "Multiline"
    assert tags == ["monitor/margin$", "monitor/plan_flips$", "monitor/staleness$"]
    assert "ΔNLL" in written["monitors"]
