"""Two runs that want the same folder."""

import threading

import pytest

from app.locks import build_once, exclusive_run
from models.functional.errors import UsageError


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    with exclusive_run(tmp_path / "run"), pytest.raises(UsageError, match=r"type hydra.run.dir=<another folder>"):  # noqa: SIM117
        with exclusive_run(tmp_path / "run"):
            pytest.fail("two runs in one folder")
    with pytest.raises(ValueError, match="broke"), exclusive_run(tmp_path / "run"):
        raise ValueError("broke")
    with exclusive_run(tmp_path / "run"), exclusive_run(tmp_path / "other"):
        pass


def test_the_other_ranks_of_a_run_belong_to_it(tmp_path, monkeypatch):
    with exclusive_run(tmp_path / "run"):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with exclusive_run(tmp_path / "run"), build_once(tmp_path / "cache" / "model", pytest.fail):
            pass


def test_what_one_run_makes_the_next_one_finds(tmp_path):
    """The second waits, says so, and begins when the first has ended."""
    path, order = tmp_path / "cache" / "model", []
    begun, waits = threading.Event(), threading.Event()

    def first():
        with build_once(path, pytest.fail):
            begun.set()
            assert waits.wait(30)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(30)
    with build_once(path, waits.set):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert [made.name for made in tmp_path.iterdir()] == ["locks"]  # and nothing among the models
