"""The Slurm launcher's configuration follows the trainer's devices; the plugin is an optional extra."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

CONF = Path(__file__).parents[2] / "conf"


def test_a_slurm_job_has_a_task_for_each_device():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install -e '.[cluster]'")
    asked = ["paths.run_dir=run", "trainer=fsdp", "trainer.devices=8", "trainer.num_nodes=2", "hydra/launcher=slurm"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=asked, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    launcher = cfg.hydra.launcher
    assert launcher["_target_"].endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 8, 8)
