"""How a masked model is sampled for the rows of a table: one set of options for teachers, students and models of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from models.functional.errors import UsageError, require_at_least, require_choice

Remasking = Literal["low_confidence", "random"]


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
    """

    forwards: tuple[int, ...] = (1, 2, 4, 8, 16)
    temperature: float = 1.0
    temperatures: tuple[float, ...] = ()
    remasking: Remasking = "random"
    guidance: float = 0.0
    block_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("forwards", "temperatures"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list, as YAML has it
        require_choice("remasking", self.remasking, get_args(Remasking))
        require_at_least(0, temperature=self.temperature)
        if (
            len({self.temperature, *self.temperatures}) <= len(self.temperatures)
            or min(self.temperatures, default=0) < 0
        ):
            raise UsageError(
                f"temperatures={list(self.temperatures)} must be at least 0, each another one than temperature="
                f"{self.temperature:g}; type for example [0.8, 0.9]"
            )
        if self.block_length is not None:
            require_at_least(1, block_length=self.block_length)

    @property
    def rows(self) -> list[tuple[int, float]]:
        """(forward passes, temperature) of each row of the table."""
        return [(n, t) for t in (self.temperature, *self.temperatures) for n in self.forwards]

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `MaskedDiffusionDecoder`."""
        names = ("temperature", "remasking", "block_length", "guidance")
        return {name: getattr(self, name) for name in names}


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
            )
        except UsageError as error:
            raise UsageError(f"module.teacher_{error}") from None


def require_blocks(option: str, block_length: int | None, forwards: Sequence[int], response_length: int) -> None:
    """Raise UsageError unless blocks fill a response and each number of forward passes is a multiple of their number."""
    if block_length is None:
        return
    if block_length < 1 or response_length % block_length:
        raise UsageError(f"{option}={block_length} must divide the response length {response_length}")
    blocks = response_length // block_length
    if any(n % blocks for n in forwards):
        raise UsageError(
            f"{option}={block_length} makes {blocks} blocks, so each of module.forwards={list(forwards)} must be a multiple of "
            f"{blocks}; type for example module.forwards=[{blocks},{response_length}]"
        )
