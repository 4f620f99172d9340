"""Configurations as Hydra composes them, faster: the files that they choose are read and merged once a process."""

import os
from copy import deepcopy
from functools import cache

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from helpers.experiment import ROOT

CONF = ROOT / "conf"


def composed(*overrides: str) -> DictConfig:
    """What `by_hydra` gives."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if any(_is_for_hydra(override) for override in parsed):
        return by_hydra(*overrides)
    cfg = deepcopy(_of_files(*(override.input_line for override in parsed if _is_file(override))))
    ConfigLoaderImpl._apply_overrides_to_config([override for override in parsed if not _is_file(override)], cfg)
    cfg.hydra.overrides.task = list(overrides)
    cfg.hydra.runtime.cwd = os.getcwd()
    separators = cfg.hydra.job.config.override_dirname
    cfg.hydra.job.override_dirname = get_overrides_dirname(
        overrides=parsed,
        kv_sep=separators.kv_sep,
        item_sep=separators.item_sep,
        exclude_keys=separators.exclude_keys,
    )
    return cfg


def by_hydra(*overrides: str) -> DictConfig:
    """The configuration of these options, that of Hydra itself among it."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().clear()


@cache
def _of_files(*chosen: str) -> DictConfig:
    return by_hydra(*chosen)


def _is_for_hydra(override: Override) -> bool:
    """Whether an option does more than choose a file or set a value."""
    return override.key_or_group.startswith("hydra") or override.is_delete() or override.is_sweep_override()


def _is_file(override: Override) -> bool:
    return (CONF / override.key_or_group).is_dir()
