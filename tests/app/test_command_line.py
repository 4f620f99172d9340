"""What is typed wrong gets a sentence with what to type; what Leap tells to type is read back as it was meant."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.experiment import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from app import command_line, modes
from app.command_line import MODES, mistake_in, quoted
from app.experiments import OTHERS, WIDTH, experiment_list, listed
from app.renamed import FLOWS, NAMES
from models.functional.errors import UsageError
from reporting.command import command, option

MISTAKES = [
    (["module.sigmaa=1"], "there is no option module.sigmaa; did you mean module.sigma?"),
    (["trainer.max_step=10"], "did you mean trainer.max_steps or"),
    (["module.lrr=1"], "did you mean module.stages.adapt.lr or module.stages.flow.lr or module.stages.polish.lr?"),
    (["module=logit_flow", "module.lrr=1"], "did you mean module.lr or"),
    (["module.stages.flow.shar=1"], "did you mean module.stages.flow.share or"),
    (["modul.lr=1"], "there is no option modul.lr"),
    (["data.sise=tiny"], "did you mean data.size or"),
    (["qqq=1"], "there is no option qqq; see them all with --cfg job"),
    (["pair.theta.path=x"], "pair.theta.path=x: this experiment has no pair"),
    (["~callbacks.nothing"], "there is no option callbacks.nothing"),
    (["trainer.limit_train_batches=2"], "type +trainer.limit_train_batches=2 to set it"),
    (["module=step_halvin"], "module=step_halvin is not known; did you mean module=step_halving?"),
    (["logger=wandb"], "logger=wandb is not known; type one of none, tensorboard"),
    (["module/code=leading"], "this experiment chooses no module/code; type +module/code=..."),
    (["seed"], "seed: an option is written <name>=<value>, without spaces"),
    (["objectives"], "objectives: type experiment=objectives"),
    (["--module=logit_flow"], "--module=logit_flow: options have no dashes; type module=logit_flow"),
    (["--seed", "1"], "--seed is no flag; options have no dashes; type seed=<value>"),
    (["-seed=1"], "-seed=1: options have no dashes; type seed=1"),
    (["--multi"], "--multi is no flag; did you mean --multirun?"),
    (["--lists"], "--lists is no flag; did you mean --list?"),
    (["--list=all"], "--list=all: type --list alone"),
    (["--run", "lr=1"], "there is no option lr"),
    (["tutorial_meanflo"], "tutorial_meanflo: type experiment=tutorial_meanflow"),
    (["list"], "list: type --list"),
    (["report"], "report: type mode=report"),
    (["seed=0,1"], "holds several values; for a run of each type python run.py -m"),
    (["module.forwards=[1,2"], 'type for example "module.forwards=[1,2]"'),
    (["flow=logit"], "flow has another name today; type module=logit_flow"),
    (["+flow=logit"], "type module=logit_flow"),
    (["flow=null"], "flow=null: flow has another name today; type one of module=logit_flow"),
    (["flow=lgit"], "type one of module=logit_flow, module=noisy_mask_flow"),
    (["module=meanflow_distill"], "type one of module=logit_flow, module=noisy_mask_flow"),
    (["attention=causal"], "type model.attention=causal"),
]
TEXTS = ["who=anna", "name[The Vaults], food[French]", "it's", 'say "hello"', "back\\slash\\", "\\'", "${x}\\${y}",
         "$HOME `x` !", "null", "3", "", "two\nlines", "a,b", "/x/lr=1/last.ckpt", "plain"]  # fmt: skip


def test_flags_come_first():
    """Hydra reads no options behind a flag in the middle."""
    typed = ["experiment=qstar_oracle", "-m", "seed=0,1", "--cfg", "job", "module.lr=1"]
    assert quoted(typed) == ["-m", "--cfg", "job", "experiment=qstar_oracle", "seed=0,1", "module.lr=1"]


def test_modes_are_those_that_there_are(configure):
    for name in MODES:
        assert getattr(modes, name)
    with pytest.raises(UsageError, match=", ".join(MODES)):
        modes.run_mode(configure("experiment=objectives", "mode=nothing"))


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_a_mistake_is_answered_with_what_to_type(arguments, sentence):
    assert sentence in mistake_in(["experiment=meanflow_llada", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ["module.sigma=1", "seed=3", "+trainer.limit_train_batches=2", "~callbacks.lr", "hydra.run.dir=x"],
        ["-m", "module=logit_flow,noisy_mask_flow", "seed=0,1"],
        ["++module.anything=1", "module.stages={adapt: {share: 1}}", "module.stages.adapt.anything=1"],
        ["--cfg", "job", "--resolve"],
        ["--help", "nonsense"],
        ["--config-dir=conf", "--multirun", "seed=1"],
    ],
)
def test_what_can_be_composed_is_left_alone(arguments):
    assert mistake_in(["experiment=meanflow_llada", *arguments]) is None


@pytest.mark.parametrize("group", ["experiment", "data", "callbacks", "logger", "trainer", "module/objective"])
@pytest.mark.parametrize("value", ["null", "''", "[a,b]", "{a:1}", "2"])
def test_a_group_takes_the_name_of_a_file_alone(group, value):
    assert f"{group}=" in mistake_in(["experiment=objectives", f"{group}={value}"])


@pytest.mark.parametrize("name", ["paths.output_dir", "paths.cache_dir", "hydra.run.dir", "hydra.sweep.dir"])
@pytest.mark.parametrize("value", ["null", "", "' '", "[a,b]"])
def test_a_folder_of_runs_cannot_be_left_out(name, value):
    """An empty name would be the root of the file system."""
    sentence = mistake_in(["experiment=objectives", f"{name}={value}"])
    assert sentence == f"{name}={value}: {name} cannot be left out; type {name}=<a folder>"
    assert mistake_in(["experiment=objectives", *quoted([f"{name}=2026"])]) is None


@pytest.mark.parametrize("name", ["2026", "1e3", "lr=1"])
def test_a_run_may_be_named_by_a_number(name, configure):
    assert configure("experiment=objectives", *quoted([f"name={name}"])).name == name


def test_without_an_experiment_only_a_report_is_made():
    assert mistake_in(["mode=report"]) is None
    for arguments in (["seed=1"], ["module.lr=1"], ["mode=generate"]):
        assert "no experiment is named; type python run.py experiment=" in mistake_in(arguments)


def test_names_of_before_are_no_names_of_today():
    for name in ("flow", *NAMES):
        assert mistake_in(["experiment=next_token_text", f"{name}=1"]) is not None
    for choice in FLOWS.values():
        assert mistake_in(["experiment=meanflow_llada", choice]) is None


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            "defaults:\n  - meanflow_llada\n  - override /flow: logit\n",
            "write for example `override /module: logit_flow`",
        ),
        (
            "defaults:\n  - objectives\nattention: causal\n",
            "sets attention, which has another name today; write model.attention",
        ),
        ("defaults:\n  - objectives\nmodel: {hidden_size: 8}\n", None),
    ],
)
def test_files_of_before_are_answered_with_what_to_write(tmp_path, monkeypatch, lines, sentence):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.setattr(command_line, "CONF", tmp_path / "conf")
    command_line._compose.cache_clear()
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\n" + lines)
    mistake = mistake_in(["experiment=mine"])
    assert mistake is None if sentence is None else sentence in mistake


def read_back(argument: str) -> object:
    """The value that a run gets of an option."""
    cfg = OmegaConf.create()
    OmegaConf.update(cfg, "prompt", OverridesParser.create().parse_override(argument).value())
    return cfg.prompt


@pytest.mark.parametrize("text", TEXTS)
def test_printed_commands_are_read_back_by_shell_and_hydra(text):
    line = command("experiment=objectives", option("prompt", text))
    done = subprocess.run(
        ["bash", "-c", f"python() {{ printf '%s\\0' \"$@\"; }}; {line}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\0")[:-1] == shlex.split(line)[1:]
    assert read_back(shlex.split(line)[-1]) == text


@pytest.mark.parametrize("text", ["who=anna", "name[The Vaults]", "/x/lr=1/last.ckpt", "it's a=b", "a: {b"])
def test_a_value_that_needs_quotes_is_answered_with_them(text):
    sentence = mistake_in(["experiment=objectives", f"licence={text}"])
    (typed,) = shlex.split(sentence.split("; type ")[1])
    assert read_back(typed) == text


AS_TYPED = ["who=anna", "name[The Vaults], eatType[pub]", "[The Vaults], x", "安娜看见雨吗？", "it's 5%", "🙂 👩‍👩‍👧 = a,b",
            "choice(a,b)", "a: {b", 'he said "no"', "two words", "(see) [1", "C:\\new\\", "l'été", "a;b|c&d<e>",
            "costs ${x} or ${oc.env:HOME}"]  # fmt: skip


@pytest.mark.parametrize("text", AS_TYPED)
def test_a_prompt_is_read_as_it_is_typed(text):
    (argument,) = quoted([f"prompt={text}"])
    assert read_back(argument) == text
    assert mistake_in(["experiment=next_token_text", argument]) is None


@pytest.mark.parametrize("typed", ["plain", "'a=b'", "null", "3", "[a,b]", "", '"a, b"', "'it's'"])
def test_a_value_that_hydra_reads_or_that_is_in_quotes_stays(typed):
    assert quoted([f"prompt={typed}"]) == [f"prompt={typed}"]


def test_a_comma_separates_the_values_of_a_sweep():
    assert quoted(["-m", "prompt=a,b"]) == ["-m", "prompt=a,b"]
    assert quoted(["-m", "prompt=who=anna, name[x],c d"]) == ["-m", "prompt='who=anna','name[x]',c d"]
    assert quoted(["prompt=a,b"]) == ["prompt='a,b'"]


@pytest.mark.parametrize(
    "name",
    [
        "name",
        "ckpt_path",
        "student_path",
        "data.train",
        "model.path",
        "paths.output_dir",
        "hydra.run.dir",
        "prompt_file",
        "answers_file",
    ],
)
def test_a_path_is_read_as_it_is_typed(name):
    for path in ("/x/lr=1/last.ckpt", "run[1]/a.txt", "it's/a b.txt"):
        (argument,) = quoted([f"{name}={path}"])
        assert OverridesParser.create().parse_override(argument).value() == path
    for stays in ("[a.txt,b.txt]", "a.txt,b.txt", "${x}/y", "[a=1"):
        assert quoted([f"{name}={stays}"]) == [f"{name}={stays}"]
    assert quoted(["module.lr=a=b"]) == ["module.lr=a=b"]
    assert quoted([f"{name}=~/a.txt"]) == [f"{name}={Path.home()}/a.txt"]
    assert quoted([f"{name}=~no such user/a"]) == [f"{name}='~no such user/a'"]


def test_prompts_of_a_real_shell(tmp_path):
    """Inside one pair of quotes of the shell, as a reader of the documentation types them."""
    lines = [
        f"python run.py experiment=next_token_text {shlex.quote(f'prompt={text}')} -c job" for text in AS_TYPED[1:5]
    ]
    script = f'python() {{ {shlex.quote(sys.executable)} "$@" || exit; }}; {"; echo ---; ".join(lines)}'
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240, encoding="utf-8"
    )
    assert done.stderr == ""
    assert [OmegaConf.create(part).prompt for part in done.stdout.split("---\n")] == AS_TYPED[1:5]


def documented_commands() -> list[list[str]]:
    """The options of every command in the documentation and in the headers of conf/; shell variables are left out."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("conf/**/*.yaml")]
    lines = [line for path in files for line in path.read_text().splitlines()]
    found = [re.match(r"[\s#]*python run\.py (.*?)(\s{2,}.*| \\)?$", line) for line in lines]
    commands = {match[1] for match in found if match and not re.search(r"\.\.\.|<|=NAME|\[option", match[1])}
    return [[part for part in shlex.split(line) if not re.fullmatch(r"\$?[A-Z]+", part)] for line in sorted(commands)]


def test_documented_commands_compose():
    mistakes = {" ".join(options): mistake_in(options) for options in documented_commands()}
    assert len(mistakes) > 50
    assert not {line: mistake for line, mistake in mistakes.items() if mistake is not None}


def run(*arguments: str, folder) -> subprocess.CompletedProcess:
    code = "import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_what_is_printed_without_a_task_fits_a_screen_and_imports_no_torch(tmp_path, arguments):
    done = run(*arguments, folder=tmp_path)
    *screen, imported = done.stdout.splitlines()
    assert done.returncode == 0
    assert imported == "False"
    assert 15 < len(screen) <= 24
    assert max(map(len, screen)) <= 100
    assert not list(tmp_path.iterdir())
    typed = [re.match(r" *(python run\.py .*?)(\s{2,}.*)?$", line) for line in screen]
    commands = [shlex.split(match[1])[2:] for match in typed if match and "NAME" not in match[1]]
    assert len(commands) > 3
    for options in commands:
        assert options[0] in ("--list", "--help") or mistake_in(options) is None
    groups = [line.split("=")[0].strip() for line in re.findall(r"[a-z/]+=(?=[a-z0-9_]+, )", done.stdout)]
    for group in groups:  # choices that the help names exist
        for choice in re.search(rf"(?<![/\w]){group}=([\w, ]+)", done.stdout)[1].split("  ")[0].split(", "):
            assert (ROOT / "conf" / group / f"{choice.strip()}.yaml").is_file() or group == "mode"


def test_the_list_has_every_experiment_on_a_line(tmp_path):
    done = run("--list", folder=tmp_path)
    *lines, _ = done.stdout.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
    assert max(map(len, lines)) <= WIDTH
    assert OTHERS not in lines  # add a line to app/experiments.py


def test_the_list_has_what_no_route_names_with_its_own_words(tmp_path):
    (tmp_path / "mine.yaml").write_text("# @package _global_\n# What I try" + 30 * " now" + "\n# more\nname: mine\n")
    (tmp_path / "bare.yaml").write_text("name: bare\n")
    (tmp_path / "meanflow_scan.yaml").write_text("name: meanflow_scan\n")
    assert listed(tmp_path)[OTHERS] == {"bare": "", "mine": "What I try" + 30 * " now"}
    lines = experiment_list(tmp_path).splitlines()
    assert "  meanflow_scan  SCAN: the prompt determines the answer" in lines
    (mine,) = (line for line in lines if line.startswith("  mine"))
    assert mine.startswith("  mine           What I try now now")
    assert mine.endswith("...")
    assert len(mine) <= WIDTH


@pytest.mark.parametrize(
    ("arguments", "expected", "code"),
    [
        (["experiment=objective"], "did you mean experiment=objectives", 2),
        (["experiment=zzz"], "experiment=zzz is not known; python run.py --list shows all", 2),
        (["experiment=objectives", "modul.lr=1"], "there is no option modul.lr", 2),
        (["experiment=objectives", "mode=train"], "mode=train is not known; type mode=fit", 2),
    ],
)
def test_the_command_line_itself(tmp_path, arguments, expected, code):
    """In a process of its own: no traceback, the right exit status."""
    done = run(*arguments, folder=tmp_path)
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == code


def test_what_is_printed_may_be_cut_off_by_its_reader():
    line = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'run.py'))} --list | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", b"\\u2192 \\xe9"), ("latin-1", b"\\u2192 \xe9"), ("utf-8", "→ é".encode())]
)
def test_what_an_output_cannot_hold_is_printed_by_its_number(encoding, printed):
    code = "import run; run.print_anything(); print('\u2192 \xe9')"
    place = {"cwd": ROOT, "env": os.environ | {"PYTHONIOENCODING": encoding}}
    assert subprocess.check_output([sys.executable, "-c", code], **place).rstrip() == printed
