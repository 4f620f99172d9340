"""A run is tested, asked, exported and gone on with as what it was made with, whatever its files and options are today."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.daily import daily
from helpers.experiment import SMALL

from app import modes
from app.build import data_of
from app.run_files import find_checkpoint
from models.functional.errors import UsageError
from reporting.record import read_record

NAMES = ("anna", "boris", "clara", "dora", "emil", "fred")
PLACES = ("rome", "paris", "oslo", "lima", "bern")
CAUSAL = ["experiment=next_token_text", "logger=none", *SMALL, "model.num_attention_heads=2"]
CAUSAL += [
    "model.num_key_value_heads=2",
    "trainer.max_steps=3",
    "data.batch_size=4",
    "temperature=0",
    "module.forwards=[1]",
]


def write_pairs(path: Path, more: str = "") -> str:
    rows = [f"{name} sees {place}?,{place} sees {name} now" for name in NAMES for place in PLACES]
    path.write_text("\n".join(["question,answer", *rows]) + "\n" + more)
    return str(path)


def write_notes(path: Path, more: str = "") -> str:
    path.write_text("\n\n".join(f"Note {k}. {NAMES[k % 6]} left for {PLACES[k % 5]}." for k in range(40)) + more)
    return str(path)


PAIRS = ["data=pairs", "data.prompt_field=question", "data.response_field=answer"]
CORPORA = {
    "pairs": (
        write_pairs,
        PAIRS,
        ["zoe meets quito?,quito meets zoe soon\n" * 3, "anna sees anna?,anna sees anna now\n"],
    ),
    "packed_text": (
        write_notes,
        ["data.cut=blank_line", "data.sequence_length=12"],
        ["\n\nZoe quit Quito." * 3, "\n\nNote 9."],
    ),
}
STUDENT = [
    "experiment=meanflow_scan", "data.prompt_field=question", "data.response_field=answer", "module.forwards=[1]", *SMALL,
    "teacher.max_steps=2", "trainer.max_steps=2", "trainer.val_check_interval=2", "module=logit_flow", "logger=none",
    "data.prompt_length=null", "data.response_length=null", "data.batch_size=8", "example_prompt=null",
]  # fmt: skip


def printed_by(cfg, capsys) -> list[str]:
    capsys.readouterr()
    modes.run_mode(cfg)
    return capsys.readouterr().out.splitlines()


def answers(cfg, capsys) -> str:
    return printed_by(cfg, capsys)[-1]


def figures(run: Path) -> dict:
    """What the record says of the model itself, but for what depends on the clock."""
    return read_record(run / "record.json")["rows"][0]["quality"]


@pytest.mark.filterwarnings("ignore:data.test is not set")
@pytest.mark.parametrize("tokenizer", daily(["bpe", "phrases", "words"], "bpe"))
@pytest.mark.parametrize("corpus", CORPORA)
def test_answers_and_scores_stay_when_the_seed_changes_and_rows_are_appended(
    configure, tmp_path, capsys, corpus, tokenizer
):
    write, options, more = CORPORA[corpus]
    train = write(tmp_path / "train.csv" if corpus == "pairs" else tmp_path / "train.txt")
    short = [*CAUSAL, *options, f"data.train={train}", f"data.tokenizer={tokenizer}", "data.vocab_size=120"]
    place = f"paths.run_dir={tmp_path}/out/next_token_text/run"
    modes.run_mode(configure(*short, place))
    test = ["mode=test", f"paths.run_dir={tmp_path}/out/next_token_text/test"]
    ask = ["mode=generate", "prompt='anna sees'"]
    modes.run_mode(configure(*short, *test))
    kept = figures(tmp_path / "out" / "next_token_text" / "test"), answers(configure(*short, *ask), capsys)
    write(Path(train), more[0])
    modes.run_mode(configure(*short, *test, "seed=1"))
    now = figures(tmp_path / "out" / "next_token_text" / "test"), answers(configure(*short, *ask, "seed=1"), capsys)
    assert now == kept
    write(Path(train), more[1])
    with pytest.raises(UsageError, match=r"the training rows are not those of the run in .*leave ckpt_path out"):
        modes.run_mode(configure(*short, "ckpt_path=last", "trainer.max_steps=4"))
    Path(train).unlink()  # what answers needs no rows
    assert answers(configure(*short, *ask), capsys) == kept[1]


@pytest.mark.filterwarnings("ignore:data.test is not set")
def test_a_student_is_asked_exported_and_tested_with_its_own_vocabulary_and_teacher(
    configure, tmp_path, capsys, monkeypatch
):
    train = write_pairs(tmp_path / "train.csv")
    short = [*STUDENT, f"data.train={train}", "data.vocab_size=60"]
    place = f"paths.run_dir={tmp_path}/elsewhere/my run"
    printed = printed_by(configure(*short, place), capsys)
    folder = tmp_path / "elsewhere" / "my run"
    held_out = json.loads((folder / "data" / "corpus.json").read_text())["example_prompt"]
    assert held_out in {f"{name} sees {place}?" for name in NAMES for place in PLACES}
    (line,) = (line for line in printed if line.startswith("generate:"))
    assert line.endswith(f"""mode=generate "prompt='{held_out}'\"""")
    ask = ["mode=generate", f"prompt='{held_out}'"]
    before = answers(configure(*short, *ask), capsys)
    (teacher,) = (tmp_path / "cache" / "teachers").glob("scan-*")
    greedy = [row["quality"] for row in read_record(folder / "record.json")["rows"]]
    # 1. another seed, and a working directory from which no relative path leads anywhere
    monkeypatch.chdir(tmp_path / "elsewhere")
    away = [*short, f"paths.output_dir={tmp_path}/out", "paths.cache_dir=none", "seed=1"]
    assert answers(configure(*away, *ask), capsys) == before
    monkeypatch.chdir(tmp_path / "elsewhere")
    modes.run_mode(configure(*away, "mode=test", f"paths.run_dir={tmp_path}/elsewhere/test"))
    again = [row["quality"] for row in read_record(tmp_path / "elsewhere" / "test" / "record.json")["rows"]]
    assert again == greedy
    # 2. exported without another teacher
    answers(configure(*away, "mode=export", f"paths.run_dir={tmp_path}/out/meanflow_scan/export"), capsys)
    exported = tmp_path / "out" / "meanflow_scan" / "export" / "model"
    assert answers(configure(*away, *ask, f"student_path={exported}"), capsys) == before
    shutil.copytree(exported, tmp_path / "moved")
    assert answers(configure(*away, *ask, f"student_path={tmp_path}/moved"), capsys) == before
    assert not (tmp_path / "none" / "teachers").exists()
    # 3. what other options would need is refused, and nothing is trained
    with pytest.raises(UsageError, match=r"data.vocab_size=50: the run in .* was made with data.vocab_size=60"):
        modes.run_mode(configure(*away, *ask, "data.vocab_size=50"))
    with pytest.raises(UsageError, match=r"was trained with another vocabulary.*type data.tokenizer="):
        modes.run_mode(configure(*short, "data.vocab_size=50", "data.too_long=drop", f"teacher.path={teacher}"))
    shutil.move(teacher, tmp_path / "gone")
    with pytest.raises(UsageError, match=r"mode=test trains no teacher.*or teacher\.path=<its folder>"):
        modes.run_mode(configure(*away, "mode=test"))
    with pytest.raises(UsageError, match=r"is not there; type teacher\.path="):
        modes.run_mode(configure(*away, *ask))
    assert answers(configure(*away, *ask, f"teacher.path={tmp_path}/gone"), capsys) == before
    # 4. a run of before, which noted its teacher relative to its working directory and nothing else
    shutil.move(tmp_path / "gone", teacher)
    shutil.rmtree(folder / "data")
    (folder / "made_with.json").unlink()
    description = json.loads((folder / "student" / "student.json").read_text())
    description["notes"]["teacher"] = f"cache/teachers/{teacher.name}"
    (folder / "student" / "student.json").write_text(json.dumps(description))
    monkeypatch.chdir(tmp_path)
    assert answers(configure(*short, *ask, "seed=1", f"student_path={folder}/student"), capsys) == before


@pytest.mark.filterwarnings("ignore:data.test is not set")
def test_test_rows_that_have_changed_are_refused_and_other_data_are_taken(configure, tmp_path):
    train = write_pairs(tmp_path / "train.csv")
    short = [*CAUSAL, *PAIRS, "data.vocab_size=120"]
    run = f"paths.run_dir={tmp_path}/out/next_token_text/run"
    modes.run_mode(configure(*short, f"data.train={train}", run))
    cfg = configure(*short, f"data.train={train}", "mode=test")
    weights = find_checkpoint(tmp_path / "out" / "next_token_text", "last")
    kept = data_of(cfg, weights)
    kept.require_same_test()
    held_out = kept.example_prompt()
    lines = Path(train).read_text().splitlines()
    changed = [line.replace(" now", " then") if line.startswith(held_out) else line for line in lines]
    Path(train).write_text("\n".join(changed))
    with pytest.raises(UsageError, match=r"the test rows are not those of the run in .*restore its data.train"):
        data_of(cfg, weights).require_same_test()
    Path(train).write_text("\n".join(line for line in lines if not line.startswith("anna")))
    write_pairs(tmp_path / "other.csv", f"{held_out},never\n")
    other = configure(*short, f"data.train={tmp_path}/other.csv", f"data.test={tmp_path}/other.csv", "mode=test")
    found = data_of(other, weights)
    found.require_same_test()
    assert found.tokenizer.get_vocab() == kept.tokenizer.get_vocab()
    assert len(found.rows["test"]) == 31


@pytest.mark.filterwarnings("ignore:data.test is not set")
@pytest.mark.parametrize("corpus", CORPORA)
def test_validation_rows_that_have_changed_are_refused_when_a_run_goes_on(configure, tmp_path, corpus):
    write, options, (_, more) = CORPORA[corpus]
    end = "csv" if corpus == "pairs" else "txt"
    train, val = write(tmp_path / f"train.{end}"), write(tmp_path / f"val.{end}")
    short = [*CAUSAL, *options, f"data.train={train}", "data.vocab_size=120"]
    short += [f"data.test={write(tmp_path / f'test.{end}')}"]
    modes.run_mode(configure(*short, f"data.val={val}", f"paths.run_dir={tmp_path}/out/next_token_text/run"))
    checkpoint = find_checkpoint(tmp_path / "out" / "next_token_text", "last")
    data_of(configure(*short, f"data.val={val}"), checkpoint).require_same_training()
    write(Path(val), more)
    with pytest.raises(UsageError, match=r"the validation rows are not those of the run in .*data\.val=FILE"):
        modes.run_mode(configure(*short, f"data.val={val}", "ckpt_path=last", "trainer.max_steps=4"))
    other = write(tmp_path / f"other.{end}", more)
    data_of(configure(*short, f"data.val={other}"), checkpoint).require_same_training()


def test_runs_in_other_folders_are_found_while_they_are_the_experiments_own(configure, tmp_path):
    notes = write_notes(tmp_path / "notes.txt")
    short = [*CAUSAL, *CORPORA["packed_text"][1], f"data.train={notes}", "data.vocab_size=120"]
    modes.run_mode(configure(*short, f"paths.run_dir={tmp_path}/far", "name=mine"))
    last = find_checkpoint(tmp_path / "out" / "mine", "last")
    assert last == tmp_path / "far" / "checkpoints" / "last.ckpt"
    modes.run_mode(configure(*short, "mode=test", "name=mine", f"paths.run_dir={tmp_path}/out/mine/test"))
    modes.run_mode(configure(*short, f"paths.run_dir={tmp_path}/far", "name=other"))
    assert find_checkpoint(tmp_path / "out" / "other", "last") == last
    with pytest.raises(UsageError, match="no run of it left a checkpoint"):  # another experiment has taken its folder
        find_checkpoint(tmp_path / "out" / "mine", "last")


@pytest.mark.filterwarnings("ignore:data.test is not set")
def test_the_model_of_another_run_is_named_and_one_s_own_is_asked_for(configure, tmp_path, capsys):
    """Two corpora under one experiment: what is asked without a run is the newest, whatever file is typed."""
    one, two = write_notes(tmp_path / "one.txt"), write_notes(tmp_path / "two.txt", "\n\nZoe quit Quito." * 9)
    short = [*CAUSAL, *CORPORA["packed_text"][1], "data.vocab_size=120", "data.tokenizer=words"]
    runs = tmp_path / "out" / "next_token_text"
    modes.run_mode(configure(*short, f"data.train={one}", f"paths.run_dir={runs}/one"))
    ask = ["mode=generate", "prompt='anna sees'"]
    first = answers(configure(*short, *ask, f"data.train={one}"), capsys)
    modes.run_mode(configure(*short, f"data.train={two}", f"paths.run_dir={runs}/two", "seed=5"))
    capsys.readouterr()
    modes.run_mode(configure(*short, *ask, f"data.train={one}"))
    said = capsys.readouterr()
    assert f"this is the model of {runs}/two, the newest run" in said.err
    assert f"was trained on {two}; for that of another run type ckpt_path=" in said.err
    assert said.out.splitlines()[-1] != first
    own = [*short, *ask, f"data.train={one}", f"ckpt_path={runs}/one/checkpoints/last.ckpt"]
    modes.run_mode(configure(*own))
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == first
    assert "note:" not in said.err
    modes.run_mode(configure(*short, *ask, f"data.train={two}"))
    assert "note:" not in capsys.readouterr().err
    modes.run_mode(configure(*short, *ask, "data.train=gone.txt"))  # from another working directory
    assert "note:" not in capsys.readouterr().err


def test_a_checkpoint_of_another_module_is_refused_before_any_work(configure, tmp_path):
    short = [
        "experiment=objectives",
        "data.size=tiny",
        "data.train_rows=32",
        "logger=none",
        *SMALL,
        "trainer.max_steps=1",
    ]
    run = f"paths.run_dir={tmp_path}/out/run"
    modes.run_mode(
        configure(*short, "module.forwards=[1]", "data.val_rows=8", "data.test_rows=8", "data.batch_size=8", run)
    )
    checkpoint = f"ckpt_path={tmp_path}/out/run/checkpoints/last.ckpt"
    for mode in ("fit", "test", "generate"):
        with pytest.raises(UsageError, match="was trained by PretrainModule, and these options make a"):
            modes.run_mode(configure("experiment=mixture_oracle", "data.size=tiny", checkpoint, f"mode={mode}"))
