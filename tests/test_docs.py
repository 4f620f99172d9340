"""What the documentation names exists, and the site has every page."""

import importlib.util
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

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


def pages_of(nav) -> list[str]:
    """Paths of all pages in a part of mkdocs' `nav`."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(part)]


def test_every_page_is_in_the_navigation_of_the_site_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    there = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages_of(nav)) == sorted(there)


@pytest.fixture
def hooks():
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / "docs" / "mkdocs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_front_page_lead_to_pages_of_the_site(hooks):
    page = hooks.on_page_markdown("", SimpleNamespace(meta={"source": "README.md"}))
    links = re.findall(r"\]\(([^)#\s]+)", page)
    assert "tutorial.md" in links
    assert "changelog.md" in links
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []


def test_reference_pages_name_every_module_of_an_existing_package(hooks):
    for path in (ROOT / "docs" / "reference").glob("*.md"):
        meta = re.match(r"---\npackage: (\S+)\n---", path.read_text())
        if path.name != "index.md" and not path.name.startswith("options"):
            shown = hooks.on_page_markdown("", SimpleNamespace(meta={"package": meta[1]}))
            modules = {file.stem for file in (ROOT / meta[1]).glob("*.py")} - {"__init__"}
            assert modules
            assert {line.rsplit(".", 1)[-1] for line in shown.split() if "." in line} == modules


def leaves(options: dict, above: str = "") -> list[str]:
    """Dotted names of the values in nested options that are typed; a list or a mapping on one line is a value."""
    found = []
    for name, value in options.items():
        if name == "defaults" or str(name).startswith("_"):
            continue
        nested = isinstance(value, dict) and any(str(part).startswith("_target_") for part in value)
        found += leaves(value, f"{above}{name}.") if nested else [f"{above}{name}"]
    return found


def test_option_pages_have_every_option_with_its_default_and_meaning(hooks, tmp_path):
    """Also nested ones, values with signs of a table, comments with a colon, and options without a comment."""
    (tmp_path / "one.yaml").write_text(
        "# @package _global_\n# What it is for.\ndefaults:\n  - _self_\n_target_: a.B\nrate: 1.0e-3 # a | b: of <c>\n"
        "  # more of it\nplain: [1, 2]\n\n# a new part\nstages: # shares\n  adapt: {share: 0.3} # first\nempty: null\n"
    )
    text = hooks.options_of(tmp_path / "one.yaml", "module/code")
    assert text.startswith("\n## `module/code=one`\n\nWhat it is for.\n")
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        "| `module.code.rate` | `1.0e-3` | a \\| b: of &lt;c> more of it |",
        "| `module.code.plain` | `[1, 2]` |  |",
        "| `module.code.stages` |  | shares |",
        "| `module.code.stages.adapt` | `{share: 0.3}` | first |",
        "| `module.code.empty` | `null` |  |",
    ]
    for page in ("options_methods", "options_runs"):
        header = yaml.safe_load((ROOT / "docs" / "reference" / f"{page}.md").read_text().split("---")[1])
        shown = hooks.on_page_markdown("", SimpleNamespace(meta=header))
        for group in header["options"]:
            for file in (ROOT / "conf" / group).glob("*.yaml"):
                prefix = f"{group.replace('/', '.')}." if group else ""
                for name in leaves(yaml.safe_load(file.read_text()) or {}):
                    assert f"| `{prefix}{name}" in shown, (file, name)


def versions(changelog: str, citation: str, project: str) -> list[tuple[str, str | None]]:
    """(version, date) of the newest released heading, of the citation and, without a date, of the package."""
    newest = re.search(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d{2}-\d{2})$", changelog, re.MULTILINE)
    cited = yaml.safe_load(citation)
    return [
        (newest[1], newest[2]),
        (str(cited["version"]), str(cited["date-released"])),
        (tomllib.loads(project)["project"]["version"], None),
    ]


def test_the_version_is_the_same_everywhere():
    texts = [(ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff", "pyproject.toml")]
    newest, cited, package = versions(*texts)
    assert newest == cited
    assert package[0] == newest[0]
    headings = re.findall(r"^## (.*)$", texts[0], re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == " - ".join(newest)


def test_versions_that_differ_are_seen():
    changelog = "# Changelog\n\n## Unreleased\n\n- 9.9.9\n\n## 1.2.3 - 2026-01-02\n\n## 1.2.2 - 2026-01-01\n"
    found = versions(changelog, "version: 1.2.2\ndate-released: 2026-01-02\n", '[project]\nversion = "1.2.3"\n')
    assert found == [("1.2.3", "2026-01-02"), ("1.2.2", "2026-01-02"), ("1.2.3", None)]


MARKED = re.compile(r"<!-- results\n.*?<!-- end of results -->", re.DOTALL)
NUMBER = re.compile(r"[<≤~+-]*\$?[\d.,]*\d[\d.,]*( ?%)?( ± [\d.,]+| \[[^\]]*\])?")
COMPUTED = {  # tables of figures that no run measured
    "docs/cluster.md": {"What an 8B body needs"},
    "docs/meanflow.md": {"LM1B: numbers that compare with publications", "OpenWebText"},
}


def tables_of_figures(text: str) -> list[str]:
    """Headings above tables with a column of numbers that are not made from records."""
    found, heading, table = [], "", []
    for line in [*MARKED.sub("", text).splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif table:
            columns = list(zip(*table[2:], strict=False))
            numbers = [[cell for cell in column if cell] for column in columns]
            right = any(re.fullmatch("-+:", cell) for cell in table[1])
            if right or any(len(n) > 1 and all(map(NUMBER.fullmatch, n)) for n in numbers):
                found.append(heading)
            table = []
        if line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def test_tables_of_figures_are_made_from_records():
    """All but those of the log, which says that its records were not kept, and computed ones."""
    pages = [page for page in PAGES if "log" not in page.relative_to(ROOT).parts]
    assert len(pages) < len(PAGES)
    found = {str(page.relative_to(ROOT)): tables_of_figures(page.read_text()) for page in pages}
    assert {page: set(headings) for page, headings in found.items() if headings} == COMPUTED


def test_a_table_of_figures_outside_of_records_is_seen():
    rows = "| a | 1 | .5 ± .1 |\n| b | - | 0.6 [0.5, 0.7] |\n"
    table = "# Page\n\n## Part\n\n| decoder | NFE | valid |\n| --- | {0} | {0} |\n" + rows
    for align in ("---:", "---"):
        assert tables_of_figures(table.format(align)) == ["Part"]
    words = "# Page\n\n## Part\n\n| decoder | valid |\n| --- | ---: |\n| a | .5 to .6 |\n| b | .7 (one seed) |\n"
    assert tables_of_figures(words) == ["Part"]
    assert tables_of_figures(words.replace("---:", "---")) == []
    marked = (
        table.format("---:").replace("| decoder", "<!-- results\nname: a\n-->\n| decoder") + "<!-- end of results -->\n"
    )
    assert tables_of_figures(marked) == []
    assert tables_of_figures(marked + "\n" + table.format("---:")) == ["Part"]
    assert tables_of_figures("# Page\n\n| option | default |\n| --- | --- |\n| `a` | `1` |\n| `b` | `2` |\n") == []
