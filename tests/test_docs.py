"""What the documentation names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "app|benchmarks|callbacks|conf|datamodules|docs|lightning_modules|models|reporting|tests"


def missing(text: str, folder: Path) -> list[str]:
    """Files and folders of this project that a page names and that do not exist; links are relative to its folder."""
    named = re.findall(rf"`((?:{FOLDERS})/[\w./]*\w|run\.py|tests/[\w./]+)`?", text)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    return [n for n in named if not (ROOT / n).exists()] + [link for link in links if not (folder / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    assert missing(page.read_text(), page.parent) == []


def test_a_missing_file_is_seen():
    assert missing("`models/nothing.py` and [this](nowhere.md)", ROOT) == ["models/nothing.py", "nowhere.md"]
    assert missing("`run.py`, `models/flow` and [the licence](LICENSE)", ROOT) == []
