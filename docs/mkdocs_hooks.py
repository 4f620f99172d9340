"""Hook of mkdocs: pages of the site that are made from files elsewhere.

`source: README.md` in a page's header: the page shows that file of the root. Its links lead to the pages of the site; files
that are no page are named without a link.
`package: models/flow`: the page lists the package's modules and their public members, from the docstrings.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
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


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page before it is rendered."""
    if source := page.meta.get("source"):
        return LINK.sub(site_link, (ROOT / source).read_text())
    if package := page.meta.get("package"):
        return markdown + modules_of(package)
    return markdown
