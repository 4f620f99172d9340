"""Every option of every experiment refuses values of a wrong type by name, and takes the ones that it has."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import helpers.composed
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import OmegaConf

from app.options import _constructed, arguments, check_options, check_value
from app.own_options import require_read
from models.functional.errors import UsageError

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def composed(*overrides):
    cfg = helpers.composed.composed("paths.run_dir=run", *overrides)
    HydraConfig.instance().set_config(cfg)
    return cfg


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_an_experiment_sets_has_the_right_type(name):
    """And is read; for whatever is true or false the user is told to type that."""
    cfg = composed(f"experiment={name}")
    require_read(cfg)
    check_options(cfg)
    switches = [
        (f"{prefix}{key}", arguments(node["_target_"])[key])
        for prefix, node in _constructed(cfg, "")
        for key in node
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], bool)
    ]
    assert len(switches) >= 5
    for option, kind in switches:
        for wrong in ("maybe", "no", 1, 2, [True], {"a": 1}):
            said = _sentence_of(option, wrong, kind)
            assert said is None or f"{option}=" in said, option
            assert said is None or "; type true or false" in said or "; type true, false or null" in said, said
        assert "; type true" in _sentence_of(option, "maybe", kind)


def _sentence_of(option: str, value: Any, kind: Any) -> str | None:
    try:
        check_value(option, value, kind)
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=abc", "seed=abc should be a valid integer"),
        ("seed=1.5", "seed=1.5 should be a valid integer"),
        ("seed=0.0", "seed=0.0 should be a valid integer"),
        ("seed=null", "seed=null should be a valid integer"),
        ("ckpt_path=3", "ckpt_path=3 should be a valid string"),
        ("data.batch_size=abc", "data.batch_size=abc should be a valid integer"),
        ("data.train_rows=null", "data.train_rows=null should be a valid integer"),
        ("module.weight_decay=[1]", r"module.weight_decay=\[1\] should be a valid number"),
        ("module.forwards=2", r'module.forwards=2 should be a list; type "module.forwards=\[2\]"'),
        ("module.forwards=x", r'module.forwards=x should be a list; type "module.forwards=\[x\]"'),
        ("name=null", "name=null should be a valid string"),
        ("name=''", "name= names the folder of the runs below paths.output_dir"),
        ("name=../x", "name=../x names the folder"),
        ("name=/x", "name=/x names the folder"),
        ("name=.", "name=. names the folder"),
        ("samples=-1", "samples=-1 must be at least 0"),
        ("module.forwards=[a]", "module.forwards"),
        ("teacher.module.lr=fast", "teacher.module.lr=fast should be a valid number"),
        ("trainer.max_steps=many", "trainer.max_steps=many should be a valid integer"),
        ("callbacks.progress.stage=[1]", r"callbacks.progress.stage=\[1\] should be a valid string"),
        (
            "callbacks.export=abc",
            "callbacks.export=abc is no part of a run; type callbacks.export=null to do without it",
        ),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0 must be at least 1"),
        (
            "trainer.val_check_interval=0",
            "trainer.val_check_interval=0 must be at least 1 step; to leave validation out",
        ),
        ("recompute=no", "recompute=no should be a valid boolean; type true or false"),
        ("recompute=1", "recompute=1 should be a valid boolean; type true or false"),
        ("recompute=maybe", "recompute=maybe should be a valid boolean; type true or false"),
        (
            "model.tie_word_embeddings=maybe",
            "model.tie_word_embeddings=maybe should be a valid boolean; type true or false",
        ),
        ("recompute=null", "recompute=null should be a valid boolean; type true or false"),
        ("stream=maybe", "stream=maybe should be a valid boolean; type true, false or null"),
        ("stream=1", "stream=1 should be a valid boolean; type true, false or null"),
        ("seed=true", "seed=true should be a valid integer"),
        ("trainer.max_steps='5'", "trainer.max_steps=5 should be a valid integer, without quotes"),
        ("teacher.module.lr='1e-3'", "teacher.module.lr=1e-3 should be a valid number, without quotes"),
        ("module.forwards=['1']", r"module.forwards=\['1'\] should be a valid integer"),
        ("callbacks.checkpoint.save_top_k=all", "callbacks.checkpoint.save_top_k=all should be a valid integer"),
    ],
)
def test_values_of_a_wrong_type_are_named(override, message):
    with pytest.raises(UsageError, match=message):
        check_options(composed("experiment=meanflow_llada", override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("module.types.a.levels=two", "module.types.a.levels=two should be a valid integer"),
        ("module.types.a.levels=2.5", "module.types.a.levels=2.5 should be a valid integer"),
        ("module.types.a.levels=2.0", "module.types.a.levels=2.0 should be a valid integer"),
        ("module.types.b.codes='4'", "module.types.b.codes=4 should be a valid integer, without quotes"),
        ("module.weights.text=[1,x]", "module.weights.text=.* should be a valid number"),
        ("module.search.begin=soon", "module.search.begin=soon should be a valid number"),
    ],
)
def test_a_part_of_an_option_is_named_alone(override, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        check_options(composed("experiment=concept_oracle", override))


@pytest.mark.parametrize(
    "override",
    [
        "module.sigma=1",
        "trainer.max_steps=-1",
        "ckpt_path=last",
        "trainer.precision=16",
        "data.num_workers=2",
        "temperature=0",
    ],
)
def test_other_ways_of_writing_a_right_value_are_taken(override):
    check_options(composed("experiment=meanflow_llada", override))


def test_what_is_built_or_missing_is_left_to_its_maker():
    target = {"_target_": "callbacks.ema.TrainableEMA", "decay": 0.5}
    cfg = OmegaConf.create(dict.fromkeys(("ckpt_path", "student_path", "forwards", "temperature")) | {
        "seed": 0, "samples": 3, "n": 1, "optimized_metric": "val/loss", "compile": None, "recompute": False,
        "part": {"_target_": "callbacks.progress.StageProgress", "stage": "???"},
        "list": {"_target_": "builtins.list", "of": [target]},
    })  # fmt: skip
    check_options(cfg)
    cfg.list.of[0].decay = "x"
    check_options(cfg)  # inside a list it is checked when it is made


# -- the options of a module are its dataclass and its file of conf/module, and both agree -------------------------------


def plain(value):
    """Dataclasses, tuples and mappings as what YAML has."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def differences(listed: dict, options: type, *, values: bool = True) -> dict[str, tuple]:
    """{option: (in the file, in the dataclass)} where they differ; interpolations, such as of the seed, have any value."""
    known = plain(options())
    named = {name: value for name, value in listed.items() if name != "_target_"}
    same = [name for name in named.keys() & known.keys() if not values or str(named[name]).startswith("${")]
    pairs = {name: (named.get(name, "missing"), known.get(name, "missing")) for name in named | known}
    return {name: pair for name, pair in pairs.items() if name not in same and pair[0] != pair[1]}


MODULES = sorted(path.stem for path in (ROOT / "conf" / "module").glob("*.yaml") if path.stem != "none")


@pytest.mark.parametrize("name", MODULES)
def test_a_file_lists_every_option_of_its_module_with_its_default(name):
    """A file that varies another one (it has a defaults list, such as noisy_mask_flow_text) has values of its own."""
    listed = OmegaConf.to_container(composed(f"module={name}").module, resolve=False)
    options = getattr(get_object(listed["_target_"]), "options_class", None)
    varies = "defaults" in OmegaConf.load(ROOT / "conf" / "module" / f"{name}.yaml")
    assert options is None or not differences(listed, options, values=not varies)


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Options:
    lr: float = 0.1
    shares: tuple[float, ...] = (0.0, 1.0)
    inner: Inner = Inner()
    seed: int = 0
    kind: Literal["a", "b"] = "a"


class Module:
    options_class = Options

    def __init__(self, model: int, options: Options | None = None, **changes: Any) -> None: ...


def test_differences_of_a_file_and_its_dataclass_are_found():
    listed = {"_target_": "x", "lr": 0.1, "shares": [0.0, 1.0], "inner": {"size": 3}, "seed": "${seed}", "kind": "a"}
    assert not differences(listed, Options)
    assert differences(listed | {"lr": 0.2}, Options) == {"lr": (0.2, 0.1)}
    assert differences(listed | {"inner": {"size": 4}}, Options) == {"inner": ({"size": 4}, {"size": 3})}
    assert differences(listed | {"more": 1}, Options) == {"more": (1, "missing")}
    del listed["lr"]
    assert differences(listed, Options) == {"lr": ("missing", 0.1)}
    assert differences(listed | {"lr": 0.2}, Options, values=False) == {}


class Above:
    def __init__(self, rows: int, name: str = "") -> None: ...


class Below(Above):
    def __init__(self, name: bool, **passed_on: Any) -> None: ...


class Sizes(TypedDict):
    tied: bool


def sized(*, kind: str, **sizes: Unpack[Sizes]) -> None: ...


def test_arguments_that_are_passed_on_have_types_too():
    assert arguments(f"{__name__}.Below") == {"rows": int, "name": bool, "return": type(None), "passed_on": Any}
    assert arguments(f"{__name__}.sized") == {"kind": str, "tied": bool, "return": type(None)}


def test_types_of_a_modules_options_are_those_of_its_dataclass():
    known = arguments(f"{__name__}.Module")
    assert known["lr"] is float
    assert known["kind"] == Literal["a", "b"]
    assert "options" not in known
    assert "changes" not in known
