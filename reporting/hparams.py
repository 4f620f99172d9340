"""Options and results of a run, as rows of TensorBoard's table of hyper-parameters."""

from typing import Any

# of the configuration; the rest are folders and files
PARTS = ("seed", "data", "model", "module", "teacher", "pair", "trainer")


def hyperparameters(config: dict[str, Any]) -> dict[str, str | float | bool]:
    """The options of a run as one flat table, each under the name that the command line gives it."""
    flat: dict[str, str | float | bool] = {}

    def gather(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                gather(part, f"{name}.{key}")
        elif value is not None and not name.endswith("_target_"):
            flat[name] = value if isinstance(value, str | int | float | bool) else str(value)

    for part in PARTS:
        gather(config.get(part), part)
    return flat


def headline(record: dict[str, Any]) -> dict[str, float]:
    """The figures of the main row: of the student with the fewest forward passes, else of the model, else of the last row."""
    rows = record["rows"]
    own = [row for row in rows if row["method"] == "student"] or [row for row in rows if row["method"] == "model"]
    row = min(own, key=lambda row: row["nfe"]) if own else rows[-1]
    return {
        f"result/{name}": float(figure) for name, figure in row["quality"].items() if isinstance(figure, int | float)
    }
