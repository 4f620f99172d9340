"""Each rule speaks on its own sick run and only it does; on a healthy one all are silent; what was said is not repeated."""

import io

import pytest
from helpers.monitors import SixRows, Watched
from helpers.trainer import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console

from callbacks.monitors.exchange import ExchangeMonitor
from callbacks.monitors.gradient import GradientMonitor
from callbacks.monitors.health import Health
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
                "nll_given_own": 2.0 - 1.5 * done,
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
    "the search cannot decide": {"margin": lambda k: 0.02, "plan_flips": lambda k: 0.7},
    "plans collapsed early": {"posterior_entropy_share": lambda k: 0.03, "plan_flips": lambda k: 0.0},
    "kept plans are stale": {"staleness": lambda k: 4.0 + k},
    "the relaxation is far from the choice": {"relaxation_cosine": lambda k: 0.3},
    "the planner does not make up its mind": {"posterior_entropy_share": lambda k: 0.97},
    "nothing teaches the planner": {"planner_gradient": lambda k: 0.0, "planner_gradient_max": lambda k: 0.0},
    "the planner's gradient explodes": {"planner_gradient_max": lambda k: 0.5 if k < 5 else 9e3},
    "only the first words learn from the plan": {"nll_at_4": lambda k: 2.0, "nll_at_8": lambda k: 1.99},
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
    assert "another text's plan costs +0.0000 nats a token" in said
    assert "module.corruption" in said
    assert "nothing wrong" not in said
    ((tag, text, step),) = page.texts
    assert tag == "health"
    assert "evidence: another text's plan" in text
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


def test_a_nan_gradient_is_an_explosion():
    looks = healthy()
    looks[-1] |= {"planner_gradient_max": float("nan")}
    assert spoken(looks) == {"the planner's gradient explodes"}
