"""The commands of docs/tutorial.md run, and print what the page shows: words exactly, numbers within a tolerance.

`python tests/test_tutorial.py` prints the page's commands with all of their output, for whoever writes it.
"""

import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"```bash\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)
NOT_RUN = ("pip ", "tensorboard ")
RUN = "python run.py "
NUMBER = re.compile(r"(?<![\w.-])[-+]?\d[\d,]*(?:\.\d+)?(?!\w)")
RELATIVE, ABSOLUTE = 0.05, 0.03  # another processor rounds otherwise, and a sampled text differs
QUICK = ["Your own documents"]  # needs no other section


def sections(text: str) -> dict[str, list[tuple[str, str]]]:
    """Headings, and the (command, what is shown of its output) below each."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return {title: BLOCK.findall(body) for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def launch(arguments: list[str], output: str) -> None:
    """In a process that has read all libraries before: run.py with these arguments."""
    sys.stdout = sys.stderr = open(output, "w")  # noqa: SIM115
    sys.argv = ["run.py", *arguments]
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")


class Shell:
    """Runs the page's commands in a folder, without the comments behind them.

    run.py starts in a process that has imported everything, others in bash.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["app.modes", "datamodules.oracle.datamodule"])

    def __call__(self, block: str) -> str:
        """What all commands of a block print."""
        said = ""
        for command in commands(block):
            if command.startswith(NOT_RUN):
                continue
            status, printed = (self._run if command.startswith(RUN) else self._bash)(command)
            assert status == 0, f"{command}\n{printed}"
            said += printed
        return said

    def _run(self, command: str) -> tuple[int, str]:
        output = self.folder / "printed.txt"
        child = self.context.Process(target=launch, args=(shlex.split(command, comments=True)[2:], str(output)))
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            child.start()
        finally:
            os.chdir(before)
        child.join()
        return child.exitcode, output.read_text()

    def _bash(self, command: str) -> tuple[int, str]:
        command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command)
        done = subprocess.run(["bash", "-c", command], cwd=self.folder, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr


def commands(block: str) -> list[str]:
    """The commands of a block, each perhaps of several lines."""
    joined, found = block.replace("\\\n", " "), []
    for line in joined.splitlines():
        if found and found[-1].count('"') % 2:  # inside quotes
            found[-1] += "\n" + line
        elif line.strip():
            found.append(line.strip())
    return found


def missing(shown: str, printed: str) -> list[str]:
    """The first line that is shown and was not printed in this order, if any; blanks do not count, `...` is anything."""
    left = [" ".join(line.split()) for line in printed.splitlines()]
    for line in shown.splitlines():
        wanted = " ".join(line.split())
        if wanted in ("", "..."):
            continue
        while left and not alike(wanted, left[0]):
            left.pop(0)
        if not left:
            return [line]
        left.pop(0)
    return []


def alike(wanted: str, printed: str) -> bool:
    """Whether two lines have the same words, and numbers within the tolerance; `...` in the first is anything."""
    parts = [re.escape(part) for part in NUMBER.sub("\0", wanted).split("...")]
    pattern = ".*".join(parts).replace(re.escape("\0"), f"({NUMBER.pattern})")
    found = re.fullmatch(pattern, printed)
    return found is not None and all(map(near, NUMBER.findall(wanted), found.groups()))


def near(wanted: str, printed: str) -> bool:
    a, b = (float(number.replace(",", "")) for number in (wanted, printed))
    return abs(a - b) <= max(ABSOLUTE, RELATIVE * abs(a))


def follow(folder: Path, titles: list[str], monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shell, page = Shell(folder), sections(PAGE.read_text())
    for title in titles:
        for block, shown in page[title]:
            printed = shell(block)
            assert missing(shown, printed) == [], printed


def test_a_part_of_the_tutorial_does_what_it_says(tmp_path, monkeypatch):
    follow(tmp_path, QUICK, monkeypatch)


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path, monkeypatch):
    follow(tmp_path, list(sections(PAGE.read_text())), monkeypatch)


def test_what_is_not_printed_is_missed():
    printed = "a table\n  valid   0.5  \nend\n"
    assert missing("a table\nvalid 0.5\n...\nend", printed) == []
    assert missing("valid ...", printed) == []
    assert missing("valid 0.6", printed) == ["valid 0.6"]
    assert missing("end\na table", printed) == ["a table"]


def test_numbers_may_be_a_little_off_and_words_may_not():
    printed = "valid 0.727, 1,000 texts in 12 steps, run 2x3"
    assert alike("valid 0.723, 1,040 texts in 12 steps, run 2x3", printed)
    assert alike("valid ... texts in 12 steps, run 2x3", printed)
    assert not alike("valid 0.68, 1,000 texts in 12 steps, run 2x3", printed)  # near is within 0.03 or 5 %
    assert not alike("valid 0.727, 1,060 texts in 12 steps, run 2x3", printed)
    assert not alike("valid 0.727, 1,000 texts in 13 steps, run 2x3", printed)
    assert not alike("valid 0.727, 1,000 texts in 12 steps, run 2x4", printed)
    assert not alike("valid 0.727, 1,000 words in 12 steps, run 2x3", printed)
    assert not alike("valid -0.01", "valid -")


def test_commands_of_several_lines_are_one():
    assert commands("python run.py a \\\n    b\nls x\n") == ["python run.py a      b", "ls x"]
    assert commands('python -c "\nprint(1)\n" > x\nls\n') == ['python -c "\nprint(1)\n" > x', "ls"]


if __name__ == "__main__":
    import tempfile

    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(Path(folder))
        for title, blocks in sections(PAGE.read_text()).items():
            for block, _ in blocks:
                print(f"## {title}\n{block}\n{shell(block)}", flush=True)
