"""Texts of each decoder, on the console, as Markdown and in a record."""

from rich.console import Console
from rich.markup import escape

from reporting.table import as_markdown

Sample = tuple[str, str, str, str]  # decoder, prompt, response, what is wrong with it


def print_samples(console: Console, texts: list[Sample]) -> None:
    """A heading for each decoder, and a line for each text."""
    previous = None
    for name, prompt, response, fault in texts:
        if name != previous:
            console.print(f"\n[bold]{escape(name)}[/]")
        previous = name
        console.print(f"  [dim]{escape(prompt)} →[/] {escape(response)}", highlight=False)
        if fault:
            console.print(f"    [yellow]{escape(fault)}[/]", highlight=False)


def samples_markdown(texts: list[Sample]) -> str:
    """The same as a Markdown table."""
    cells = [[cell.replace("|", "/") for cell in text] for text in texts]
    return as_markdown(["decoder", "prompt", "response", "what is wrong"], cells, left=4)


def as_records(texts: list[Sample]) -> list[dict[str, str]]:
    """The same as a record's "texts"."""
    return [dict(zip(("decoder", "prompt", "response", "fault"), text, strict=True)) for text in texts]
