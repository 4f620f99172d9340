"""Options that a file of the user's own sets and nothing reads, such as a misspelt one.

What is below a `_target_` is refused by what that builds. Elsewhere Hydra takes any name.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from app.command_line import CONF, nearest, option_names
from models.functional.errors import UsageError

RECIPES = {"teacher": "path", "pair": "theta.path"}  # groups of how a model is trained first, and an option of each


def require_read(cfg: DictConfig) -> None:
    """Raise UsageError for the first option that nothing reads.

    Not for one that was added on the command line, nor for one that another value uses (`${name}`).
    """
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]))
    known = _known(tuple(plain["pair"] or ()))
    for part, option in RECIPES.items():
        if not isinstance(plain[part], dict | None):
            raise UsageError(f"{part}={plain[part]} holds no options; type them by name, such as {part}.{option}=...")
    added = {typed.lstrip("+").split("=")[0].split("@")[-1] for typed in _typed() if typed.startswith("+")}
    texts = [text for text in (*_texts(plain), *_texts(_hydra_s_own())) if "${" in text]
    for name in _unchecked(plain):
        used = re.compile(rf"\$\{{[^}}]*\b{re.escape(name.rsplit('.', 1)[-1])}\b")  # in whatever way it is spelled
        if name in known or any(f"{other}.".startswith(f"{name}.") for other in added):
            continue
        if not any(used.search(text) for text in texts):
            others = [other for other in option_names(plain) if not f"{other}.".startswith(f"{name}.")]
            raise UsageError(
                f"the experiment sets {name}, which nothing reads; {nearest(name, others)} (a name of your own is for values "
                f"that use it, as ${{{name}}})"
            )


def _hydra_s_own() -> Any:
    """Hydra's own options, whose folders and names may use a value of the user's."""
    return OmegaConf.to_container(HydraConfig.instance().cfg) if HydraConfig.initialized() else {}


def _typed() -> list[str]:
    """What was typed, as it was: a prompt may hold ${...}."""
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return typed


def _unchecked(plain: dict[str, Any]) -> Iterator[str]:
    """Names that no constructor takes: at the top, of folders, and of the recipes of models that are trained first."""
    yield from plain
    parts = {"paths": plain["paths"], "teacher": plain["teacher"]}
    parts |= {f"pair.{name}": recipe for name, recipe in (plain["pair"] or {}).items()}
    for part, options in parts.items():
        yield from (f"{part}.{name}" for name in options or ())


@cache
def _known(pair: tuple[str, ...]) -> set[str]:
    """The names that Leap's own files have there. pair: the models of cfg.pair."""
    root = OmegaConf.load(CONF / "config.yaml")
    groups = [str(key) for default in root.defaults if OmegaConf.is_dict(default) for key in default]
    found = (
        {str(key) for key in root} | {group.split()[-1] for group in groups} | {f"paths.{key}" for key in root.paths}
    )
    for group in RECIPES:
        parts = ["teacher"] if group == "teacher" else [f"pair.{name}" for name in pair]
        files = [OmegaConf.load(path) for path in (CONF / group).glob("*.yaml")]
        found |= {f"{part}.{key!s}" for part in parts for file in files for key in file}
    return found


def _texts(node: Any) -> Iterator[str]:
    """Every text of the configuration."""
    if isinstance(node, dict | list):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _texts(part)
    elif isinstance(node, str):
        yield node
