"""Mistakes of the command line get a sentence that says what to type, before Hydra composes and any library is read."""

import os
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from app.flags import CHECKED, flags_and_options, flags_first, is_sweep, require_known_flags
from app.renamed import NAMES, instead_of
from models.functional.errors import UsageError
from reporting.command import option, shell

CONF = Path(__file__).parents[1] / "conf"
MODES = ("fit", "test", "generate", "export", "report")
# options that hold plain text; a path (or a token) may be a list of several, and the name of a run is part of a path
PROMPTS = ("prompt", "example_prompt")
PATHS = re.compile(
    r"name|(.*[._])?(path|dir|file|field)|data\.(train|val|test|tokenizer|template)|.*\.mask_token|module\.baseline"
)
NO_EXPERIMENT = "no experiment is named; type python run.py experiment=meanflow_llada, or --list for all of them"


def quoted(arguments: list[str]) -> list[str]:
    """The arguments, with quotes for Hydra around prompts and paths that its grammar takes for something else, and ~ replaced.

    Hydra reads brackets, equals signs and commas, which are characters like any others there. A value in quotes stays as it
    is; in a sweep (-m) a comma separates two values. Flags come first (`flags_first`).
    """
    sweep = is_sweep(arguments)
    return [_quoted(argument, sweep) for argument in flags_first(arguments)]


def _quoted(argument: str, sweep: bool) -> str:
    name, equals, value = argument.partition("=")
    is_prompt = name.lstrip("+") in PROMPTS
    if not equals or not (is_prompt or PATHS.fullmatch(name.lstrip("+"))):
        return argument
    if not is_prompt and value.startswith("~"):  # a shell replaces it at the beginning of a word alone
        value = os.path.expanduser(value)
        argument = f"{name}={value}"
    override = None if is_prompt and "${" in value and value[:1] not in ("'", '"') else _read(argument)
    if override is not None and (sweep or not is_prompt or not override.is_sweep_override()):
        return option(name, value) if not is_prompt and _is_number(override) else argument  # a file named 2026
    if value[:1] in ("'", '"') and value[-1:] == value[:1]:
        return argument  # quotes that do not match: the user is told
    if sweep and not set(value) & set("'\""):
        parts = [part.strip() for part in value.split(",")]
        return f"{name}={','.join(_quoted(f'{name}={part}', False).partition('=')[2] for part in parts)}"
    if not is_prompt and value[:1] in ("[", "{"):
        return argument
    return option(name, value)


def _is_number(override: Override) -> bool:
    return not override.is_sweep_override() and type(override.value()) in (int, float)


def mistake_in(arguments: list[str]) -> str | None:
    """What to tell the user of the first option that cannot be read, or that the experiment does not have.

    None where there is no such mistake. Any other error is left to Hydra.
    """
    try:
        _check(arguments)
    except UsageError as error:
        return str(error)
    return None


def _check(arguments: list[str]) -> None:
    require_known_flags(arguments)
    typed = _options(arguments)
    if typed is None:
        return
    overrides = [_parsed(text) for text in typed]
    for override in overrides:
        _require_one_value(override, sweep=is_sweep(arguments))
        _require_folder(override)
        _require_mode(override)
    groups = [override for override in overrides if _is_group(override)]
    for override in groups:
        _require_known_choice(override)
    options = _composed(groups)
    if options is None:
        return
    for name in NAMES.keys() & options.keys():  # a file of the user's own sets it, and nothing reads it
        raise UsageError(f"the experiment sets {name}, which has another name today; write {instead_of(name)}")
    set_before: list[str] = []
    for override in overrides:
        name = override.key_or_group
        if override in groups:
            continue
        if not name.startswith("hydra") and not _within(name, set_before):
            _require_known(override, options)
        set_before.append(name)
    reports = any(override.key_or_group == "mode" and override.value() == "report" for override in overrides)
    if _trains_nothing(options) and not reports and "--cfg" not in arguments and "-c" not in arguments:
        raise UsageError(NO_EXPERIMENT)


def _require_mode(override: Override) -> None:
    if override.key_or_group == "mode" and not override.is_sweep_override() and override.value() not in MODES:
        raise UsageError(f"mode={override.value()} is not known; type mode={', '.join(MODES)}")


def _options(arguments: list[str]) -> list[str] | None:
    """The arguments that are options; None where a flag asks for something that is not ours to check."""
    flags, options = flags_and_options(arguments)
    return options if all(flag in CHECKED for flag, *_ in flags) else None


def _parsed(text: str) -> Override:
    """The option as Hydra reads it."""
    override = _read(text)
    if override is not None:
        return override
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{text}: {_meant_by(name)}")
    if value[:1] in ("[", "{"):
        raise UsageError(
            f"{text}: the brackets hold something that needs quotes, or do not match; type for example "
            f"{shell(f'{name}=[1,2]')} or " + shell(f"{name}=['two words',word]")
        )
    raise UsageError(f"{text}: the value has characters that need quotes; type {shell(option(name, value))}")


def _meant_by(word: str) -> str:
    """What to type in the place of a word that is no option."""
    if word in ("list", "help"):
        return f"type --{word}"
    if word in MODES:
        return f"type mode={word}"
    experiments = [path.stem for path in (CONF / "experiment").glob("*.yaml")]
    close = get_close_matches(word, experiments, n=1, cutoff=0.8)
    if close:
        return f"type experiment={close[0]}"
    return "an option is written <name>=<value>, without spaces; python run.py --help shows more"


def _read(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def _require_one_value(override: Override, sweep: bool) -> None:
    if override.is_sweep_override() and not sweep:
        name, _, value = (override.input_line or "").partition("=")
        raise UsageError(
            f"{name}={value} holds several values; for a run of each type python run.py -m ..., for a list "
            f"{shell(f'{name}=[{value}]')}, for one text {shell(option(name, value))}"
        )


def _require_folder(override: Override) -> None:
    """Hydra makes these folders before any other check."""
    name = override.key_or_group
    if not name.startswith("paths") and name not in ("hydra.run.dir", "hydra.sweep.dir"):
        return
    values: list[Any] = [None] if override.is_delete() else [override.value()]
    values = list(override.sweep_iterator()) if override.is_sweep_override() else values
    if name == "paths" or not all(isinstance(value, str) and value.strip() for value in values):
        option_name = "paths.output_dir" if name == "paths" else name
        raise UsageError(f"{override.input_line}: {name} cannot be left out; type {option_name}=<a folder>")


# -- groups ----------------------------------------------------------------------------------------------------------


def _is_group(override: Override) -> bool:
    """Whether an option chooses a file of conf/, such as module=pretrain."""
    name = override.key_or_group
    return not name.startswith("hydra") and not override.is_delete() and (CONF / name).is_dir()


def _choices(override: Override) -> list[str]:
    """What a choice of a group names: several in a sweep."""
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    return ["null" if value is None else str(value) for value in values]


def _require_known_choice(override: Override) -> None:
    group = override.key_or_group
    known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    for choice in _choices(override):
        if choice in known:
            continue
        instead = instead_of(group, choice)
        if instead is not None:
            raise UsageError(f"{group}={choice} has another name today; type {instead}")
        close = [f"{group}={name}" for name in get_close_matches(choice, known)]
        others = "python run.py --list shows all" if group == "experiment" else f"type one of {', '.join(known)}"
        meant = f"did you mean {' or '.join(close)}?" if close else others
        raise UsageError(f"{group}={choice} is not known; {meant}")


def _composed(groups: list[Override]) -> dict[str, Any] | None:
    """The options that the chosen files make, with the first choice of each sweep; None where they do not fit together."""
    chosen = []
    for override in groups:
        prefix = "+" if override.is_add() else ""
        package = f"@{override.package}" if override.package else ""
        chosen.append(f"{prefix}{override.key_or_group}{package}={_choices(override)[0]}")
    try:
        return _compose(*chosen)
    except HydraException as error:
        _explain(error, groups)
        return None


@cache
def _compose(*chosen: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            plain: Any = OmegaConf.to_container(compose("config", list(chosen)), resolve=False)
            return plain
    finally:
        GlobalHydra.instance().clear()


def _explain(error: HydraException, groups: list[Override]) -> None:
    """Raise UsageError for a file that overrides a group of before, and for a choice that the experiment does not have."""
    text = str(error)
    if "'flow'" in text:
        raise UsageError(
            "a file overrides /flow, which is /module today; write for example `override /module: logit_flow`, and nothing "
            "for `override /flow: null`"
        ) from None
    for override in groups:
        name = override.key_or_group
        if f"'{name}'" in text and "No match in the defaults list" in text:
            raise UsageError(
                f"{name}=... : this experiment chooses no {name}; type +{name}=... to add it, if its module takes one"
            ) from None


# -- options ---------------------------------------------------------------------------------------------------------


def _within(name: str, others: list[str]) -> bool:
    """Whether a name is one of the others, or a part of one."""
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _require_known(override: Override, options: dict[str, Any]) -> None:
    """Raise UsageError for an option that the configuration does not have, with the nearest that it has."""
    name, line = override.key_or_group, override.input_line or ""
    known = option_names(options)
    if name in known:
        return
    instead = instead_of(name, line.partition("=")[2])
    if instead is not None:
        raise UsageError(f"{line}: {name} has another name today; type {instead}")
    if override.is_add() or override.is_force_add():
        return
    if _trains_nothing(options):
        raise UsageError(f"{line}: {NO_EXPERIMENT}")
    begin, _, last = name.rpartition(".")
    part = known.get(begin)
    if isinstance(part, list):
        return  # Hydra knows whether it is that long
    if isinstance(part, dict) and last in _accepted(part):
        raise UsageError(f"{line}: the experiment leaves {name} at its default; type {shell(f'+{line}')} to set it")
    for above in (name[:at] for at, letter in enumerate(name) if letter == "."):
        if above in known and known[above] is None:
            raise UsageError(f"{line}: this experiment has no {above}")
    raise UsageError(f"{line}: there is no option {name}; {nearest(name, list(known))}")


def _trains_nothing(options: dict[str, Any]) -> bool:
    """Whether no experiment, and no module, has been chosen."""
    return options["module"] is None and options["study"] is None


def option_names(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every option by its full name, the parts that hold others among them."""
    found = {}
    for name, value in options.items():
        if name != "_target_":
            found[f"{prefix}{name}"] = value
            found |= option_names(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
    return found


def _accepted(part: dict[str, Any]) -> set[str]:
    """The arguments of what a part of the configuration builds, listed there or not."""
    from app.options import arguments

    return set(arguments(part["_target_"])) if "_target_" in part else set()


def nearest(name: str, known: list[str]) -> str:
    """The names that come nearest: of a last part spelled alike below the same one, spelled alike, or of the same last part."""
    begin, _, last = name.rpartition(".")
    below = {other: other.rpartition(".")[2] for other in known if other.startswith(f"{begin}.") or not begin}
    alike = get_close_matches(last, set(below.values()), cutoff=0.75)
    beside = sorted((other for other in below if below[other] in alike), key=lambda other: alike.index(below[other]))
    same = [other for other in known if other.rpartition(".")[2] == last]
    found = dict.fromkeys([*beside, *get_close_matches(name, known, cutoff=0.75), *same])
    close = [other for other in found if not name.startswith(f"{other}.")][:3]
    return f"did you mean {' or '.join(close)}?" if close else "see them all with --cfg job"
