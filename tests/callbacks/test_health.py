"""Each rule fires on its own sick run and only it does; on a healthy one none fires; nothing is printed twice."""

import io

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.concept import DRAWN, TYPES
from helpers.monitors import SixRows, Watched
from helpers.trainer import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console

from callbacks.monitors.exchange import ExchangeMonitor
from callbacks.monitors.flips import FlipMonitor
from callbacks.monitors.gradient import GradientMonitor
from callbacks.monitors.health import Health
from callbacks.monitors.margin import MarginMonitor
from callbacks.monitors.positions import PositionMonitor
from callbacks.monitors.sharpness import SharpnessMonitor
from callbacks.monitors.staleness import StalenessMonitor
from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from models.interfaces.probe_batch import EStep
from reporting.health_rules import RULES

LOOKS = 10


def healthy() -> list[dict[str, float]]:
    """A run as it should be: flips fall, entropy sharpens, the plan gets worth more, every position gets cheaper."""
    looks = []
    for k in range(LOOKS):
        done = (k + 1) / LOOKS
        looks.append(
            {
                "progress": done,
                "nll_own_condition": 2.0 - 1.5 * done,
                "dnll_shuffle": 1.5 * done,
                "margin": 0.3 + done,
                "plan_flips": 0.6 * (1 - done) + 0.02,
                "staleness": 0.9 * (1 - done),
                "posterior_entropy_share": 0.95 - 0.8 * done,
                "relaxation_cosine": 0.6 + 0.35 * done,
                "planner_gradient": 0.5,
                "planner_gradient_max": 2.0,
                "nll_at_0": 2.0 - 1.5 * done,
                "nll_at_4": 2.0 - 1.2 * done,
                "nll_at_8": 2.0 - 1.0 * done,
            }
        )
    return looks


SICK = {
    "plans are not used": {"dnll_shuffle": lambda k: 0.004},
    "the search is undecided": {"margin": lambda k: 0.02, "plan_flips": lambda k: 0.7},
    "plans collapsed early": {"posterior_entropy_share": lambda k: 0.03, "plan_flips": lambda k: 0.0},
    "stored plans are stale": {"staleness": lambda k: 4.0 + k},
    "the relaxation is far from the choice": {"relaxation_cosine": lambda k: 0.3},
    "the planner stays unsure": {"posterior_entropy_share": lambda k: 0.97},
    "the planner gets no gradient": {"planner_gradient": lambda k: 0.0, "planner_gradient_max": lambda k: 0.0},
    "the planner's gradient explodes": {"planner_gradient_max": lambda k: 0.5 if k < 5 else 9e3},
    "only the first positions use the plan": {"nll_at_4": lambda k: 2.0, "nll_at_8": lambda k: 1.99},
}


def spoken(looks) -> set[str]:
    """What any rule says at any time of a run."""
    return {rule.name for k in range(len(looks)) for rule in RULES if rule.evidence(looks[: k + 1]) is not None}


def test_a_healthy_run_is_left_in_peace():
    assert spoken(healthy()) == set()


def test_every_rule_has_a_sick_run():
    assert set(SICK) == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", SICK)
def test_each_rule_speaks_on_its_sick_run_and_only_it(name):
    looks = healthy()
    for k, look in enumerate(looks):
        look |= {figure: value(k) for figure, value in SICK[name].items()}
    assert spoken(looks) == {name}


@pytest.mark.parametrize("name", SICK)
def test_a_rule_whose_figures_nobody_measures_is_silent(name):
    looks = healthy()
    for k, look in enumerate(looks):
        look |= {figure: value(k) for figure, value in SICK[name].items()}
        for figure in SICK[name]:
            del look[figure]
    assert name not in spoken(looks)


def test_a_bad_moment_is_no_illness():
    """One look at which plans seem unused, or one large gap, is noise."""
    looks = healthy()
    looks[5] |= {"dnll_shuffle": 0.0, "staleness": 9.0, "relaxation_cosine": 0.1}
    assert spoken(looks) == set()


SEARCH_BEGINS = 0.6
SEARCHED = ("margin", "plan_flips", "staleness")
VALIDATED = ("nll_own_condition", "dnll_shuffle")  # measured in validations alone


@pytest.mark.parametrize("name", SICK)
def test_each_rule_can_fire_where_a_training_validates_twice_and_searches_late(name):
    """As concept_oracle does: validations at a half and at the end, ten looks, searches from 60 % on."""
    looks = healthy()
    for k, look in enumerate(looks):
        look |= {figure: value(k) for figure, value in SICK[name].items()} | {"posterior_change": look["plan_flips"]}
        if "plan_flips" in SICK[name]:
            look["posterior_change"] = SICK[name]["plan_flips"](k)
        missing = () if look["progress"] in (0.5, 1.0) else VALIDATED
        missing += () if look["progress"] >= SEARCH_BEGINS else SEARCHED
        for figure in missing:
            del look[figure]
    assert name in spoken(looks)


def test_the_flips_of_validation_texts_stand_in_for_those_of_a_search():
    looks = healthy()
    for look in looks:
        del look["plan_flips"]
        look |= {"flip_rate": 0.0, "posterior_entropy_share": 0.01}
    assert spoken(looks) == {"plans collapsed early"}


# -- the callback ----------------------------------------------------------------------------------------------------


class Page:
    """What TensorBoard would be told."""

    def __init__(self) -> None:
        self.texts = []

    def add_text(self, tag, text, step) -> None:
        self.texts.append((tag, text, step))


def watch(module, steps: int, health: Health, **options):
    page = Page()

    class Logger(DummyLogger):
        experiment = page

    callbacks = [ExchangeMonitor(), GradientMonitor(), health, *options.pop("more", [])]
    trainer = quiet_trainer(steps, callbacks=callbacks, val_check_interval=1, logger=Logger(), **options)
    trainer.fit(module, SixRows())
    return page


def health_in(out: io.StringIO) -> Health:
    return Health(console=Console(file=out, width=300))


def test_it_names_anomaly_evidence_and_action_once():
    out = io.StringIO()
    page = watch(Watched(used=0.0), 8, health_in(out))
    said = out.getvalue()
    assert said.count("plans are not used") == 1
    assert "NLL rises by +0.0000 nats a token under another text's plan" in said
    assert "module.corruption" in said
    assert "nothing wrong" not in said
    ((tag, text, step),) = page.texts
    assert tag == "health"
    assert "evidence: NLL rises by" in text
    assert "what to try: hide more" in text
    assert step == 2  # a quarter of the training


def test_a_run_whose_plans_are_used_ends_with_a_clean_bill():
    out = io.StringIO()
    assert watch(Watched(), 8, health_in(out)).texts == []
    assert out.getvalue() == "health: nothing wrong at the last of 8 looks\n"


def test_what_was_said_is_not_said_again_after_resuming(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = health_in(io.StringIO())
    watch(Watched(used=0.0), 6, first, more=[keep], enable_checkpointing=True)
    health = health_in(out := io.StringIO())
    trainer = quiet_trainer(8, callbacks=[ExchangeMonitor(), GradientMonitor(), health], val_check_interval=1)
    trainer.fit(Watched(used=0.0), SixRows(), ckpt_path=tmp_path / "step=6.ckpt", weights_only=True)
    assert len(health.looks) >= 7
    assert "plans are not used" not in out.getvalue()
    assert set(health.present) == {"plans are not used"}


# -- when it looks, and at what --------------------------------------------------------------------------------------


def looks_of(module, steps: int, *monitors, every: int = 1, data=None, **options) -> list[dict[str, float]]:
    health = health_in(io.StringIO())
    trainer = quiet_trainer(steps, callbacks=[*monitors, health], val_check_interval=every, **options)
    trainer.fit(module, data or SixRows())
    return health.looks


def test_a_figure_is_judged_once_and_not_again_while_nothing_new_is_measured():
    """One search in a whole training is one look with a staleness, not one in every look after it."""

    class SearchesOnce(Watched):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.e_step = EStep(*torch.tensor([[0.02], [9.0], [1.0]])) if self.global_step == 1 else None
            return loss

    monitors = [StalenessMonitor(), MarginMonitor(), FlipMonitor()]
    for every in (1, 2, 5):
        looks = looks_of(SearchesOnce(), 10, *monitors, every=every)
        assert [look["staleness"] for look in looks if "staleness" in look] == [9.0]
        assert [look["progress"] for look in looks] == pytest.approx([k / 10 for k in range(1, 11)])


def test_what_a_validation_did_not_log_is_not_in_its_look():
    class LogsOnce(Watched):
        def validation_step(self, batch, batch_idx):
            self.log("val/always", 1.0)
            if self.global_step == 1:
                self.log("val/flip_rate", 0.5)

    looks = looks_of(LogsOnce(), 4)
    assert ["flip_rate" in look for look in looks] == [True, False, False, False]
    assert all("always" in look for look in looks)


def test_ten_looks_are_taken_however_seldom_the_training_validates():
    monitors = [ExchangeMonitor(), GradientMonitor(), SharpnessMonitor(), PositionMonitor(width=2)]
    looks = looks_of(Watched(), 15, *monitors, every=15)
    assert len(looks) == 15  # a tenth is less than two steps
    cheap = {"planner_gradient", "planner_gradient_max", "planner_entropy_share", "nll_at_0", "nll_at_2"}
    assert all(look.keys() >= cheap for look in looks)
    assert ["dnll_shuffle" in look for look in looks] == [False] * 14 + [True]
    # the slope of plan_head is the mean of the batch
    assert [look["planner_gradient"] for look in looks[:3]] == pytest.approx([1.5, 5.5, 9.5])
    assert all(look["planner_change"] == 0 for look in looks[1:])


def test_looks_change_nothing_about_a_training(tiny_oracle):
    def losses(*callbacks) -> list[float]:
        torch.manual_seed(0)
        ids = tiny_oracle.special_ids()
        model = tiny_causal(ids.pop("vocab_size"), **ids)
        wanted = {"types": TYPES, "weights": {"text": 1.0, "planner": 1.0}, "warmup_steps": 1, "lr": 3e-3} | DRAWN
        module = ConceptPlannerExecutorModule(model, **wanted)
        step, found = module.training_step, []

        def noted(batch, batch_idx):
            assert module.training
            loss = step(batch, batch_idx)
            found.append(float(loss.detach()) + torch.rand(1).item())
            return loss

        module.training_step = noted
        quiet_trainer(6, callbacks=list(callbacks), val_check_interval=6).fit(module, tiny_oracle)
        return found

    monitors = [SharpnessMonitor(), PositionMonitor(width=3), GradientMonitor(), MarginMonitor()]
    assert losses(*monitors, health := health_in(io.StringIO())) == losses()
    assert len(health.looks) == 6


def test_a_nan_gradient_is_an_explosion():
    looks = healthy()
    looks[-1] |= {"planner_gradient_max": float("nan")}
    assert spoken(looks) == {"the planner's gradient explodes"}
