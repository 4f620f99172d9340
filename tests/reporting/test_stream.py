"""What a watched text looks like on a console is the text itself."""

import io

import torch
from rich.console import Console

from reporting.stream import TextStream


def show(frames: list[str], *, refines: bool, terminal: bool = False, **options) -> tuple[list[str], str]:
    """What the console holds after each frame, and at the end; frames are named by their number."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=60, color_system=None)
    stream = TextStream(console, "who=anna", lambda ids: frames[int(ids)], refines=refines, **options)
    held = []
    for k in range(len(frames)):
        stream(torch.tensor([[k]]))
        held.append(file.getvalue())
    stream.finish()
    assert stream.text == frames[-1]
    return held, file.getvalue()


def test_tokens_are_written_one_after_the_other():
    held, end = show(["a", "a dog", "a dog barks"], refines=False)
    assert held == ["who=anna → a", "who=anna → a dog", "who=anna → a dog barks"]
    assert end == "who=anna → a dog barks\n"


def test_half_a_letter_waits_for_its_other_bytes():
    held, end = show(["caf", "caf\ufffd", "café"], refines=False)
    assert held == ["who=anna → caf", "who=anna → caf", "who=anna → café"]
    assert end == "who=anna → café\n"
    assert show(["caf", "caf\ufffd"], refines=False)[1] == "who=anna → caf\ufffd\n"  # and is shown where none came


def test_a_text_that_was_decoded_differently_is_written_again_as_a_whole():
    assert show(["I do", "I don't"], refines=False)[1] == "who=anna → I don't\n"
    assert show(["a ,", "a, b"], refines=False)[1] == "who=anna → a ,\na, b\n"


def test_refinements_are_lines_in_a_file_and_undecided_places_are_marked():
    _, end = show(["<mask> <mask>", "a <mask>", "a [b]"], refines=True, mask="<mask>")
    assert end == "  1  ▢ ▢\n  2  a ▢\n  3  a [b]\nwho=anna → a [b]\n"


def test_refinements_replace_each_other_on_a_terminal():
    _, end = show(["<mask> <mask>", "a <mask>", "a [b]"], refines=True, terminal=True, mask="<mask>")
    assert end.count("who=anna → ") == 4  # three frames and what stays
    assert end.rstrip("\x1b[?25h\n").endswith("who=anna → a [b]")
