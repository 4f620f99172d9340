"""Hook of mkdocs: pages of the site that are made from files elsewhere.

`source: README.md` in a page's header: the page shows that file of the root. Its links lead to the pages of the site; files
that are no page are named without a link.
`package: models/flow`: the page lists the package's modules and their public members, from the docstrings.
`options: [module, trainer]`: the page lists the options of every file in these groups of conf/, from the files' own comments.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OPTION = re.compile(r"(?P<indent> *)(?P<name>[A-Za-z_]\w*):(?: +(?P<value>[^#\s].*?))?(?: +# (?P<note>.*))?")
LINK = re.compile(r"\[([^]]*)\]\(([^)\s]+)\)")


def site_link(link: re.Match[str]) -> str:
    """A Markdown link of a file in the root, as a link of a page in docs/."""
    text, target = link[1], link[2]
    if "://" in target or target.startswith("#"):
        return link[0]
    if target.startswith("docs/"):
        return f"[{text}]({target.removeprefix('docs/')})"
    pages = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
    return f"[{text}]({pages[target]})" if target in pages else text


def modules_of(package: str) -> str:
    """A mkdocstrings block for each module in a folder of the repository."""
    files = [path for path in sorted((ROOT / package).glob("*.py")) if path.name != "__init__.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return "".join(f"\n::: {name}\n" for name in names)


def options_of(file: Path, group: str) -> str:
    """The options of a file of conf/ as a section: what its comment says, then name, default and meaning of each.

    A line of comment alone belongs to the option above it, or to the whole file before the first option.
    """
    head: list[str] = []
    rows: list[str] = []
    above = [group.replace("/", ".")]
    for before, line in pairwise(["", *file.read_text().splitlines()]):
        found = OPTION.fullmatch(line.rstrip())
        if found is None:
            said = line.strip().removeprefix("# ")
            if line.strip().startswith("# ") and "@package" not in line:
                if above[1:] and rows and before:
                    rows[-1] = f"{rows[-1].removesuffix(' |')} {_cell(said)} |"
                elif not above[1:]:
                    head.append(said)
            continue
        above = [*above[: len(found["indent"]) // 2 + 1], found["name"]]
        if found["name"] == "defaults" or found["name"].startswith("_"):
            continue
        value, note = _cell(found["value"]), _cell(found["note"])
        if value or note:
            rows.append(f"| `{'.'.join(filter(None, above))}` | {f'`{value}`' if value else ''} | {note} |")
    title = f"{group}={file.stem}" if group else file.name
    table = ["| option | default | meaning |", "| --- | --- | --- |", *rows] if rows else []
    return "\n".join([f"\n## `{title}`\n", *head, "", *table, ""])


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page before it is rendered."""
    if source := page.meta.get("source"):
        return LINK.sub(site_link, (ROOT / source).read_text())
    if package := page.meta.get("package"):
        return markdown + modules_of(package)
    if groups := page.meta.get("options"):
        files = [(file, group) for group in groups for file in sorted((ROOT / "conf" / group).glob("*.yaml"))]
        return markdown + "".join(options_of(file, group) for file, group in files)
    return markdown
