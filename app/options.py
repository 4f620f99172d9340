"""Checks the types of options before any work begins, against the annotations of what they build."""

import inspect
import math
from collections.abc import Iterator
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from models.functional.errors import UsageError
from reporting.command import shell

# options that no constructor takes
OWN = {
    "name": str,
    "seed": int,
    "samples": int,
    "n": int,
    "forwards": int | None,
    "stream": bool | None,
    "temperature": float | None,
    "ckpt_path": str | None,
    "student_path": str | None,
    "report_dir": str | None,
    "prompt_file": str | None,
    "answers_file": str | None,
    "optimized_metric": str,
    "compile": str | None,
    "recompute": bool,
    "licence": str | None,
}
MOST = {"seed": 2**32 - 1}  # of numpy's generator
LARGEST = 2**63 - 1  # of a whole number in a tensor
# what Lightning itself does not refuse
LEAST = {
    "seed": 0,
    "samples": 0,
    "trainer.accumulate_grad_batches": 1,
    "trainer.max_steps": -1,
    "trainer.log_every_n_steps": 0,
}
# hold parts that are built, each of which may be null
PARTS = ("callbacks", "logger", "teacher.callbacks", "pair.theta.callbacks", "pair.target.callbacks")
KINDS: dict[type, str] = {int: "integer", float: "number", bool: "boolean"}
LENIENT = ConfigDict(arbitrary_types_allowed=True)


def check_options(cfg: DictConfig) -> None:
    """Raise UsageError, naming the option, for the first value that is of another type than what it is for."""
    for name, kind in OWN.items():
        if name in cfg:
            check_value(name, cfg[name], kind)
    _require_folder_name(cfg.get("name", "run"))
    _require_bounds(cfg)
    interval = OmegaConf.select(cfg, "trainer.val_check_interval")
    if isinstance(interval, int | float) and interval <= 0:
        raise UsageError(
            f"trainer.val_check_interval={interval} must be at least 1 step; to leave validation out type "
            "trainer.limit_val_batches=0"
        )
    for group in PARTS:
        parts = OmegaConf.select(cfg, group, default={})
        if not OmegaConf.is_dict(parts) and parts != {}:
            raise UsageError(f"{group}={'null' if parts is None else parts} holds no parts by name; leave it out")
        for name, part in parts.items():
            if part is not None and not OmegaConf.is_dict(part):
                raise UsageError(
                    f"{group}.{name}={part} is no part of a run; type {group}.{name}=null to do without it"
                )
    for prefix, node in _constructed(cfg, ""):
        kinds = arguments(node["_target_"])
        for key in node:
            if (wanted := kinds.get(str(key))) and not OmegaConf.is_missing(node, key) and not _is_built(node[key]):
                check_value(f"{prefix}{key!s}", node[key], wanted)


def _require_folder_name(name: str) -> None:
    """Raise UsageError for a name that is no folder below paths.output_dir: its runs would not be told from others."""
    parts = name.split("/")
    if not set(parts).isdisjoint({"", ".", ".."}):
        raise UsageError(
            f"name={name} names the folder of the runs below paths.output_dir; type a word, such as name=mine"
        )


def _require_bounds(cfg: DictConfig) -> None:
    """Raise UsageError for the first number that is none (nan), and for whole numbers too small or large for their use."""
    for option, value in _values(cfg, ""):
        _require_number(option, value)
        if isinstance(value, int):
            most = MOST.get(option, LARGEST)
            require_within(option, value, LEAST.get(option, -most), most)


def require_within(option: str, value: int, least: int, most: int) -> None:
    """Raise UsageError for a whole number below `least` or above `most`."""
    if value < least:
        raise UsageError(f"{option}={value} must be at least {least}")
    if value > most:
        raise UsageError(f"{option}={value} must be at most {most}")


def _require_number(option: str, value: Any) -> None:
    if isinstance(value, float) and math.isnan(value):
        raise UsageError(f"{option}=nan is not a number; type one")


def _values(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every value of the configuration but Hydra's own, with where it stands; those of a list stand where the list does."""
    if OmegaConf.is_dict(node):
        for name in node:
            if not (prefix == "" and name == "hydra") and not OmegaConf.is_missing(node, name):
                yield from _values(node[name], f"{prefix}{name!s}.")
    elif OmegaConf.is_list(node):
        for k in range(len(node)):
            if not OmegaConf.is_missing(node, k):
                yield from _values(node[k], prefix)
    else:
        yield prefix.removesuffix("."), node


def _constructed(node: DictConfig, prefix: str) -> Iterator[tuple[str, DictConfig]]:
    """Every part of the configuration that names what it builds, with where it stands."""
    if "_target_" in node:
        yield prefix, node
    for name in node:
        if name != "hydra" and not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node[name]):
            yield from _constructed(node[name], f"{prefix}{name!s}.")


def arguments(target: str) -> dict[str, Any]:
    """The annotated arguments of a class or function, also those that it passes on: to the class above, or by `Unpack`.

    Of a module with an options class they are the fields of that class as well.
    """
    found = get_object(target)
    options = getattr(found, "options_class", None)
    if options is not None:
        known = _annotations(found.__init__) | _annotations(options)
        return {name: kind for name, kind in known.items() if name not in ("options", "changes")}
    known = {}
    for maker in _makers(found):
        known = _annotations(maker) | known
    for name, kind in list(known.items()):
        if get_origin(kind) is Unpack:
            known = known | _annotations(get_args(kind)[0])
            del known[name]
    return known


def _makers(found: Any) -> Iterator[Any]:
    """The function itself; of a class its constructor, and the one above as long as arguments are passed on."""
    if not inspect.isclass(found):
        yield found
        return
    for maker in (vars(kind)["__init__"] for kind in found.__mro__ if "__init__" in vars(kind)):
        yield maker
        if not inspect.isfunction(maker) or inspect.getfullargspec(maker).varkw is None:
            return


def _annotations(named: Any) -> dict[str, Any]:
    """{} where only its author's type checker can read them."""
    try:
        return get_type_hints(named)
    except (NameError, TypeError, AttributeError):
        return {}


def _is_built(value: Any) -> bool:
    """Whether a value is, or holds, something that has a constructor of its own."""
    if OmegaConf.is_dict(value):
        return "_target_" in value or any(_is_built(value[name]) for name in value)
    return OmegaConf.is_list(value) and any(_is_built(part) for part in value)


def check_value(option: str, value: Any, kind: Any) -> None:
    """Raise UsageError, naming the option or the part of it, for a value that is no `kind` as it is given.

    Types are not converted, but for a whole number where any number will do: what is built is given the value itself.
    """
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    _require_number(option, plain)
    try:
        read = TypeAdapter(kind, config=LENIENT).validate_python(plain)
    except ValidationError as error:
        raise UsageError(_sentence(option, plain, error, kind)) from None
    except PydanticUserError:  # a type that cannot be checked by looking at a value
        return
    if (found := _converted(option, plain, read)) is not None:
        name, part, wanted = found
        quotes = ", without quotes" if isinstance(part, str) else ""
        advice = _truth_values(kind) if wanted is bool else quotes
        raise UsageError(f"{name}={_shown(part)} should be a valid {KINDS[wanted]}{advice}")


def _converted(option: str, given: Any, read: Any) -> tuple[str, Any, type] | None:
    """What was read as another type, such as 1.0 as an integer or "no" as false: the option or its part, the value, the type.

    A list is shown whole.
    """
    if isinstance(given, list) and isinstance(read, list | tuple):
        parts = [_converted(option, *pair) for pair in zip(given, read, strict=False)]
        return next(((option, given, part[2]) for part in parts if part is not None), None)
    if isinstance(given, dict) and isinstance(read, dict):
        parts = [_converted(f"{option}.{name}", given[name], read[name]) for name in given.keys() & read.keys()]
        return next((part for part in parts if part is not None), None)
    if type(read) not in KINDS or type(given) is type(read) or (type(read) is float and type(given) is int):
        return None
    return option, given, type(read)


def _truth_values(kind: Any) -> str:
    """What to type for an option, or a part of one, that is true or false. kind: of the option."""
    return "; type true, false or null" if kind == bool | None else "; type true or false"


def _shown(value: Any) -> str:
    """A value as it is typed."""
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else f"{value}"
    )


def _sentence(option: str, value: Any, error: ValidationError, kind: Any) -> str:
    """What is wrong with the first part of a value that does not fit, such as module.types.a.levels of module.types."""
    parts = [(_part(option, value, problem["loc"]), problem) for problem in error.errors()]
    (name, part), _ = parts[0]
    found = [problem for (other, _), problem in parts if other == name]
    if all(problem["type"] == "literal_error" for problem in found):
        choices = [problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ") for problem in found]
        return f"{name}={_shown(part)} is not known; type one of {', '.join(choices)}"
    wanted = [problem["msg"].removeprefix("Input should be ") for problem in found]
    if isinstance(part, int | float | str) and any(problem["type"] in ("tuple_type", "list_type") for problem in found):
        return f"{name}={_shown(part)} should be a list; type {shell(f'{name}=[{_shown(part)}]')}"
    switches = any(problem["type"] in ("bool_type", "bool_parsing") for problem in found)
    wanted = [words.removesuffix(", unable to interpret input") for words in wanted]  # of truth values alone
    return (
        f"{name}={_shown(part)} should be {' or '.join(dict.fromkeys(wanted))}{_truth_values(kind) if switches else ''}"
    )


def _part(option: str, value: Any, place: tuple[int | str, ...]) -> tuple[str, Any]:
    """The part of an option's value that pydantic's `place` leads to, by name; a list is one part."""
    for step in place:
        if isinstance(value, dict) and step in value:  # other steps name one of several types
            option, value = f"{option}.{step}", value[step]
    return option, value
