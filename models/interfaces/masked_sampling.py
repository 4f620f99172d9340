"""How a masked model is sampled for the rows of a table: one set of options for teachers, students and models of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from models.functional.errors import UsageError, require_at_least, require_choice
from models.functional.next_token import EndIds

Remasking = Literal["low_confidence", "random"]
CacheKind = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class ReusedColumns:
    """Whose keys and values a forward pass takes from an earlier one (Fast-dLLM, Wu et al., 2505.22618).

    cache: of no column; `prefix`: of the columns before the block that is filled; `dual`: of those after it, too. In a
    bidirectional model they are those of an older text, so that the result is approximate.
    refresh: every so many passes within a block, one reads all columns; None: the first pass of each block alone. With 1 the
    result is exact, and nothing is saved.
    """

    cache: CacheKind = "none"
    refresh: int | None = None

    def __post_init__(self) -> None:
        require_choice("cache", self.cache, get_args(CacheKind))
        if self.refresh is not None:
            require_at_least(1, cache_refresh=self.refresh)
            if self.cache == "none":
                raise UsageError(f"cache_refresh={self.refresh} needs a cache; type module.cache=prefix or dual")


def temperature_name(temperature: float) -> str:
    """How a temperature stands in the names of decoders."""
    return {0.0: "greedy", 1.0: "sampled"}.get(temperature, f"sampled at {temperature:g}")


@dataclass(frozen=True, kw_only=True)
class MaskedSampling:
    """Errors: UsageError for values that cannot work, which begins with the field's name.

    forwards: numbers of forward passes, a row of the table each; guidance doubles them.
    temperature: 0 takes the most probable token. temperatures: further ones, with rows of all `forwards` each.
    remasking: which draws of a pass stay, see `generate_masked_diffusion`.
    guidance: weight of classifier-free guidance; 0 is none.
    block_length: response tokens that are filled before the next ones begin; None: all of them.
    cache, cache_refresh: see `ReusedColumns`.
    commit_rules: {rule: values}, further rows whose forward passes follow the confidence (`models/diffusion/commit_rules.py`).
    rule_temperature: of these rows.
    rule_block_length: block_length of the rules, whose last block may be shorter; None: the same.
    ends_last: end tokens are committed after all others, see `generate_masked_diffusion`.
    """

    forwards: tuple[int, ...] = (1, 2, 4, 8, 16)
    temperature: float = 1.0
    temperatures: tuple[float, ...] = ()
    remasking: Remasking = "random"
    guidance: float = 0.0
    block_length: int | None = None
    cache: CacheKind = "none"
    cache_refresh: int | None = None
    commit_rules: Mapping[str, Sequence[float]] | None = None
    rule_temperature: float = 0.0
    rule_block_length: int | None = None
    ends_last: bool = False

    def __post_init__(self) -> None:
        for name in ("forwards", "temperatures"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list, as YAML has it
        require_choice("remasking", self.remasking, get_args(Remasking))
        require_at_least(0, temperature=self.temperature)
        require_at_least(0, rule_temperature=self.rule_temperature)
        if (
            len({self.temperature, *self.temperatures}) <= len(self.temperatures)
            or min(self.temperatures, default=0) < 0
        ):
            raise UsageError(
                f"temperatures={list(self.temperatures)} must be at least 0, each another one than temperature="
                f"{self.temperature:g}; type for example [0.8, 0.9]"
            )
        for name in ("block_length", "rule_block_length"):
            if getattr(self, name) is not None:
                require_at_least(1, **{name: getattr(self, name)})
        ReusedColumns(self.cache, self.cache_refresh)  # checks itself

    @property
    def reused(self) -> ReusedColumns:
        return ReusedColumns(self.cache, self.cache_refresh)

    @property
    def all_temperatures(self) -> tuple[float, ...]:
        return self.temperature, *self.temperatures

    @property
    def rows(self) -> list[tuple[int, float]]:
        """(forward passes, temperature) of each row of the table."""
        return [(n, t) for t in self.all_temperatures for n in self.forwards]

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `MaskedDiffusionDecoder`."""
        names = ("temperature", "remasking", "block_length", "guidance", "reused")
        return {name: getattr(self, name) for name in names}

    def last(self, end_ids: EndIds) -> EndIds:
        """The tokens that are committed after all others, of those that end a text; None where `ends_last` is off."""
        return end_ids if self.ends_last else None

    @property
    def rule_options(self) -> dict[str, Any]:
        """Keywords of `RuleDecoder`."""
        own = {"temperature": self.rule_temperature, "block_length": self.rule_block_length or self.block_length}
        return own | {name: getattr(self, name) for name in ("guidance", "reused", "ends_last")}


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """The options of every distillation of a masked teacher: the teacher's rows in the table.

    forwards and teacher_<field>: the fields of `MaskedSampling`.
    """

    forwards: tuple[int, ...] = (1, 2, 4, 8, 16)
    teacher_temperature: float = 1.0
    teacher_temperatures: tuple[float, ...] = ()
    teacher_remasking: Remasking = "random"
    teacher_guidance: float = 0.0
    teacher_block_length: int | None = None
    teacher_commit_rules: Mapping[str, Sequence[float]] | None = None
    teacher_rule_temperature: float = 0.0
    teacher_rule_block_length: int | None = None
    teacher_ends_last: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher_temperatures", self.teacher_sampling.temperatures)
        object.__setattr__(self, "forwards", self.teacher_sampling.forwards)

    @property
    def teacher_sampling(self) -> MaskedSampling:
        """The same as one object. Errors: UsageError that names module.teacher_<field>."""
        try:
            return MaskedSampling(
                forwards=self.forwards,
                temperature=self.teacher_temperature,
                temperatures=self.teacher_temperatures,
                remasking=self.teacher_remasking,
                guidance=self.teacher_guidance,
                block_length=self.teacher_block_length,
                commit_rules=self.teacher_commit_rules,
                rule_temperature=self.teacher_rule_temperature,
                rule_block_length=self.teacher_rule_block_length,
                ends_last=self.teacher_ends_last,
            )
        except UsageError as error:
            raise UsageError(f"module.teacher_{error}") from None


def require_dividing(option: str, block_length: int | None, response_length: int) -> None:
    """Raise UsageError unless blocks fill a response."""
    if block_length is not None and (block_length < 1 or response_length % block_length):
        raise UsageError(f"{option}={block_length} must divide the response length {response_length}")


def require_blocks(option: str, block_length: int | None, forwards: Sequence[int], response_length: int) -> None:
    """Raise UsageError unless blocks fill a response and each number of forward passes is a multiple of their number."""
    require_dividing(option, block_length, response_length)
    if block_length is None:
        return
    blocks = response_length // block_length
    if any(n % blocks for n in forwards):
        raise UsageError(
            f"{option}={block_length} makes {blocks} blocks, so each of module.forwards={list(forwards)} must be a multiple of "
            f"{blocks}; type for example module.forwards=[{blocks},{response_length}]"
        )


def forwards_in_blocks(forwards: Sequence[int], block_length: int | None, response_length: int) -> list[int]:
    """Those numbers of forward passes that are multiples of the number of blocks; one pass a block where there are none."""
    blocks = response_length // (block_length or response_length)
    return [n for n in forwards if n % blocks == 0] or [blocks]
