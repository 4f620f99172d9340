"""A name in a user's own experiment file that nothing reads is told, with the nearest that there is."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from app import modes
from app.command_line import CONF
from app.own_options import require_read
from models.functional.errors import UsageError

FILE = "# @package _global_\ndefaults: [meanflow_llada]\nname: mine\n"


@pytest.fixture
def own(tmp_path):
    """A function that composes an experiment file of these lines, as the user typed."""

    def build(lines: str, *overrides: str, file: str = FILE):
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / "experiment" / "mine.yaml").write_text(file + lines)
        typed = ["paths.run_dir=run", "experiment=mine", f"hydra.searchpath=[file://{tmp_path}]", *overrides]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", typed, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return cfg

    GlobalHydra.instance().clear()
    yield build
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(
    ("lines", "name", "meant"),
    [
        ("sede: 3\n", "sede", "did you mean seed?"),
        ("trianer:\n  max_steps: 3\n", "trianer", "did you mean trainer?"),
        ("teacher:\n  max_step: 3\n", "teacher.max_step", "did you mean teacher.max_steps"),
        ("paths:\n  cachedir: x\n", "paths.cachedir", "did you mean paths.cache_dir"),
        ("mine: 3\nlr: ${minor}\nminor: 1\n", "mine", ""),
    ],
)
def test_a_name_that_nothing_reads(own, lines, name, meant):
    with pytest.raises(UsageError, match=rf"^the experiment sets {name}, which nothing reads; {meant}"):
        modes.run_mode(own(lines))


def test_names_of_a_pair(own):
    file = FILE.replace("meanflow_llada", "qstar_oracle")
    require_read(own("pair:\n  theta:\n    max_steps: 3\n", file=file))
    with pytest.raises(UsageError, match=r"sets pair\.theta\.steps, which nothing reads"):
        require_read(own("pair:\n  theta:\n    steps: 3\n", file=file))


def test_what_is_used_or_added_by_hand_is_taken(own):
    require_read(own("mine: 3\nmore: {lr: 1}\nmodule: {lr: '${more.lr}', seed: '${mine}'}\ncallbacks: {x: null}\n"))
    require_read(own("", "+note=first", "prompt='${nothing}'"))
    require_read(own("seed: 4\nteacher: {path: x}\n"))
    require_read(own("", "+trainer@more=default"))


@pytest.mark.parametrize("used", ["${mine}", "${ mine }", "${oc.select:mine,0}", "${.mine}", "${[mine]}"])
def test_a_value_of_ones_own_is_used_in_any_spelling(own, used):
    require_read(own(f"mine: 3\nexample_prompt: '{used}'\n"))


def test_a_value_of_ones_own_may_be_used_by_hydra(own):
    require_read(own("tag: a\nhydra:\n  sweep:\n    subdir: '${tag}'\n"))
    require_read(own("tag: a\n", "hydra.run.dir=runs/${tag}"))


@pytest.mark.parametrize("lines", ["teacher: /folder\n", "pair: x\n", "teacher: true\n"])
def test_a_group_that_is_no_group_is_told(own, lines):
    with pytest.raises(UsageError, match="holds no options; type them by name, such as "):
        require_read(own(lines))


def test_a_configuration_without_hydra_is_checked_too(own):
    cfg = OmegaConf.create(OmegaConf.to_container(own("sede: 3\n")))
    HydraConfig.instance().cfg = None
    with pytest.raises(UsageError, match="sets sede"):
        require_read(cfg)
