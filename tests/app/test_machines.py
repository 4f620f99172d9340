"""A run on several machines says what it waits for; one that no other machine could join is refused."""

from types import SimpleNamespace

import pytest

from app import build
from app.build import make_trainer
from app.machines import settle_machines
from models.functional.errors import UsageError

TWO = ["experiment=objectives", "trainer.accelerator=cpu", "trainer.num_nodes=2"]


@pytest.fixture
def trainer(configure, monkeypatch):
    """A function that makes a trainer in an environment of its own."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def made(*overrides: str, **environment: str):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return make_trainer(configure(*TWO, *overrides), [], False)

    return made


def test_a_port_that_nobody_knows_is_no_meeting_point(trainer, capsys):
    with pytest.raises(UsageError, match=r"trainer\.num_nodes=2 .*type trainer\.num_nodes=1, .*torchrun --nnodes=2 "):
        settle_machines(trainer())
    settle_machines(trainer("trainer.num_nodes=1"))
    assert capsys.readouterr().err == ""


def test_what_is_waited_for_is_said_by_one_process_of_a_machine(trainer, capsys):
    place = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500", "NODE_RANK": "1"}
    settle_machines(trainer(**place))
    said = (
        "waiting for 2 machines at 10.0.0.7:29500 (this one is NODE_RANK=1); on one machine type trainer.num_nodes=1\n"
    )
    assert capsys.readouterr().err == said
    settle_machines(trainer(LOCAL_RANK="1"))
    assert capsys.readouterr().err == ""


def test_torchrun_knows_its_machines(trainer, capsys):
    launched = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
    settle_machines(trainer(**launched))
    assert capsys.readouterr().err == ""


def test_an_export_waits_for_nobody(trainer, configure):
    """Its options may be those of its training."""
    corpus = SimpleNamespace(response_length=16)
    build._check_before_work(configure(*TWO, "mode=export"), corpus)
    with pytest.raises(UsageError, match="waits for 2 machines"):
        build._check_before_work(configure(*TWO), corpus)
