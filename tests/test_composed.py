"""The helper that composes configurations composes what Hydra does."""

import pytest
from helpers.composed import by_hydra, composed
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf


@pytest.mark.parametrize(
    "overrides",
    [
        ["paths.run_dir=run", "experiment=objectives", "module/objective=masked_diffusion", "seed=3", "+note=x"],
        ["experiment=meanflow_llada", "module=logit_flow", "module.loss=kl", "~logger.tensorboard", "data=pairs"],
    ],
)
def test_a_configuration_is_that_of_hydra(overrides):
    plain = [OmegaConf.to_container(cfg, resolve=False) for cfg in (composed(*overrides), by_hydra(*overrides))]
    assert plain[0] == plain[1]
    changed = composed(*overrides)
    changed.seed = 77
    changed.module.lr = 77
    assert OmegaConf.to_container(composed(*overrides), resolve=False) == plain[1]
    assert OmegaConf.to_container(composed(*overrides, "samples=9"), resolve=False) != plain[1]


@pytest.mark.parametrize("override", ["module.nothing=1", "modul=x", "seed=1,2"])
def test_what_hydra_refuses_is_refused(override):
    for make in (by_hydra, composed):
        with pytest.raises(ConfigCompositionException):
            make("experiment=objectives", override)
