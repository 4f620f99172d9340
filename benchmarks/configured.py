"""The configuration of `run.py` with some options, for benchmarks that build what it would build."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

CONF = Path(__file__).parent.parent / "conf"


def configured(options: list[str], folder: Path) -> DictConfig:
    """folder: where the run would write."""
    places = [f"paths.output_dir={folder}", f"paths.run_dir={folder}/run"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*places, *options], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return cfg
