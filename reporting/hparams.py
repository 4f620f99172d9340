"""What a run was told and what came of it, as TensorBoard's table of hyper-parameters wants it."""

from typing import Any

# of the configuration; the rest says where things lie
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
    """The figures of the row that the run is about: of its student at the fewest forwards, of its model, or the last of all."""
    rows = record["rows"]
    own = [row for row in rows if row["method"] == "student"] or [row for row in rows if row["method"] == "model"]
    row = min(own, key=lambda row: row["forwards"]) if own else rows[-1]
    return {
        f"result/{name}": float(figure) for name, figure in row["quality"].items() if isinstance(figure, int | float)
    }
