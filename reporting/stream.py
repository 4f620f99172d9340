"""A text shown while it is written: token by token, or refinement by refinement."""

from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text
from torch import Tensor

UNDECIDED = "▢"
HALF_A_LETTER = "\N{REPLACEMENT CHARACTER}"  # bytes of a letter whose other bytes are still to come


class TextStream:
    """Prints the tokens that a decoder hands over while it generates; `finish` ends the text.

    decode: ids (1, n) -> text. refines: whether a step may change any position. Such steps overwrite each other on a terminal
    and are a line each elsewhere. mask: the token of positions that are not decided yet.
    """

    def __init__(
        self, console: Console, prompt: str, decode: Callable[[Tensor], str], *, refines: bool, mask: str | None = None
    ) -> None:
        self.console, self.decode, self.refines, self.mask = console, decode, refines, mask
        self.head = Text.from_markup(f"[dim]{escape(prompt)}[/] → " if prompt else "")
        self.text, self._written, self._count = "", "", 0
        self._live = Live(console=console, auto_refresh=False) if refines and console.is_terminal else None
        if self._live is not None:
            self._live.start()
        elif not refines:
            self._print(self.head, end="")

    def __call__(self, so_far: Tensor) -> None:
        self.text, self._count = self.decode(so_far), self._count + 1
        if not self.refines:
            self._go_on(self.text.rstrip(HALF_A_LETTER))
            return
        shown = self.text.replace(self.mask, UNDECIDED) if self.mask else self.text
        if self._live is not None:
            self._live.update(self.head + Text(shown), refresh=True)
        else:
            self._print(Text(f"{self._count:3d}  {shown}", style="dim"))

    def finish(self, after: str = "") -> None:
        """Print what is left, so that the whole text stands there. after: what stands behind it."""
        if self._live is not None:
            if after:
                self._live.update(self.head + Text(self.text + after), refresh=True)
            self._live.stop()
        elif self.refines:
            self._print(self.head + Text(self.text + after))
        else:
            self._go_on(self.text)
            self._print(Text(("" if self._written == self.text else f"\n{self.text}") + after))

    def _go_on(self, text: str) -> None:
        if text.startswith(self._written):
            self._print(Text(text[len(self._written) :]), end="")
            self._written = text

    def _print(self, text: Text, end: str = "\n") -> None:
        self.console.print(text, end=end, soft_wrap=True, highlight=False)
