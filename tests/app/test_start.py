"""Starts of the same second get names of their own; a folder that cannot be made gets a sentence."""

import os
import runpy
import sys
import threading
import time
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf

from app.start import CLAIMS, claim_start
from app.sweep import _expected, missing_runs


def config(folder, **changes):
    """Its clock stands still: strftime of a text without a % is that text."""
    setup_globals()
    dirs = {"run": {"dir": "${paths.output_dir}/x/${started}"}, "sweep": {"dir": "${paths.output_dir}/x/s_${started}"}}
    return OmegaConf.create(
        {"paths": {"output_dir": str(folder)}, "started": "${now:noon}", "hydra": dirs, "name": "x"} | changes
    )


def test_starts_of_the_same_second_get_folders_of_their_own(tmp_path):
    found, together = [], threading.Barrier(8)

    def start():
        cfg = config(tmp_path)
        together.wait()
        claim_start(cfg, "hydra.run.dir")
        found.append(cfg.started)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ["noon", *(f"noon_{k}" for k in range(2, 9))]
    assert sorted(found) == names
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == names


def test_all_runs_of_a_sweep_share_its_name(tmp_path):
    claim_start(config(tmp_path), "hydra.sweep.dir")
    sweep, run = config(tmp_path), config(tmp_path)
    claim_start(sweep, "hydra.sweep.dir")
    OmegaConf.copy_cache(from_config=sweep, to_config=run)  # as Hydra does
    assert run.hydra.sweep.dir == sweep.hydra.sweep.dir == f"{tmp_path}/x/s_noon_2"


def test_a_name_that_was_typed_stays(tmp_path):
    for _ in range(2):
        cfg = config(tmp_path, started="mine")
        claim_start(cfg, "hydra.run.dir")
        assert cfg.started == "mine"


def test_other_ranks_work_where_the_first_one_does(tmp_path, monkeypatch):
    claim_start(config(tmp_path), "hydra.run.dir")
    monkeypatch.setenv("LOCAL_RANK", "1")
    cfg = config(tmp_path)
    claim_start(cfg, "hydra.run.dir")
    assert cfg.started == "noon"


def test_claims_are_forgotten_after_a_day(tmp_path):
    claim_start(config(tmp_path), "hydra.run.dir")
    days_ago = time.time() - 3 * 24 * 3600
    os.utime(tmp_path / CLAIMS / "noon", (days_ago, days_ago))
    claim_start(config(tmp_path, started="${now:night}"), "hydra.run.dir")
    assert [path.name for path in (tmp_path / CLAIMS).iterdir()] == ["night"]


def test_a_folder_below_a_file_gets_a_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        claim_start(config(tmp_path / "file" / "out"), "hydra.run.dir")
    assert ended.value.code == 2
    assert "cannot be written: Not a directory; type paths.output_dir=<a folder>" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("numbers", "expected", "missing"),
    [([0, 1], 2, []), ([0, 1], None, []), ([1], 3, [0, 2]), ([2, 0], None, [1]), ([], 2, [0, 1]), ([], None, [0])],
)
def test_runs_that_left_no_result(numbers, expected, missing):
    assert missing_runs(numbers, expected) == missing


def test_how_many_runs_there_should_be():
    basic = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": {"lr": "1,2"}}
    typed = {"overrides": {"task": ["seed=range(3)", "name=a", "x=[1,2]"]}}
    assert _expected(OmegaConf.create({"hydra": {"sweeper": basic, **typed}})) == 6
    optuna = {"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"}
    assert _expected(OmegaConf.create({"hydra": {"sweeper": optuna, **typed}})) is None


def test_a_name_may_ask_hydra_for_a_choice(tmp_path):
    """As that of experiment=objectives does, before Hydra has a configuration."""
    HydraConfig.instance().cfg = None
    choices = {"runtime": {"choices": {"module/objective": "next_token"}}}
    cfg = config(tmp_path, name="o/${hydra:runtime.choices.module/objective}")
    cfg.hydra = OmegaConf.merge(cfg.hydra, choices, {"run": {"dir": "${paths.output_dir}/${name}/${started}"}})
    claim_start(cfg, "hydra.run.dir")
    assert (tmp_path / "o" / "next_token" / "noon").is_dir()
    assert not HydraConfig.initialized()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_one_rank_says_that_libraries_are_loaded(name, monkeypatch, capsys):
    """srun sets SLURM_PROCID alone."""
    say_loading = runpy.run_path(str(Path(__file__).parents[2] / "run.py"))["say_loading"]
    for other in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for rank, said in (("0", "loading libraries\n"), ("1", "")):
        monkeypatch.setenv(name, rank)
        say_loading()
        assert capsys.readouterr().err == said
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv(name, "0")
    say_loading()
    assert capsys.readouterr().err == ""
