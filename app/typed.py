"""Options as the characters that were typed, where Hydra made something else of them, and as plain values."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf


def as_typed(option: str, value: Any) -> str | None:
    """The text of an option that holds text: "1e3" where `value` is 1000.0. None stays None.

    A value that is not from the command line, as in a configuration made by hand, is written out.
    """
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if plain is None or isinstance(plain, str):
        return plain
    parser = OverridesParser.create()
    for typed in HydraConfig.get().overrides.task if HydraConfig.initialized() else []:
        name, _, text = typed.partition("=")
        if name.lstrip("+") == option and parser.parse_override(typed).value() == plain:
            return text
    return str(plain).lower() if isinstance(plain, bool) else str(plain)


def as_plain(value: Any) -> Any:
    """The value of an option in plain lists and dictionaries, with every ${...} filled in."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
