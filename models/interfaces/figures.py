"""Figures of a model itself, such as its likelihood: callbacks add theirs, and the final table has a row of all."""

from collections.abc import Mapping


class ModelFigures:
    """values: {name: figure}, in the order in which they were added; the last one of a name counts."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        """Figures that were measured now."""
        self.values.update(figures)
