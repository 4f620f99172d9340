"""Decoders of students that are read from disk."""

from models.diffusion.sampler import MaskedDiffusionDecoder
from models.flow.masked_student import MaskedStudent
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.one_step import OneStepDecoder
from models.flow.solver import NoisyMaskDecoder, Step
from models.flow.student import Student
from models.functional.errors import UsageError
from models.interfaces.decoder import Decoder


def student_decoder(
    student: Student,
    forwards: int,
    temperature: float | None,
    *,
    step: Step = "chain",
    promote: float | None = None,
    masked_options: dict | None = None,
) -> Decoder:
    """The decoder of a student, whatever its kind. Errors: UsageError for options that this kind does not have.

    forwards: forward passes of a text. temperature: None is the default of the final table: 0, or the temperature in
    `masked_options`, which also holds the `remasking` of a masked student.
    """
    if isinstance(student, NoisyMaskStudent):
        if temperature:
            raise UsageError(
                f"temperature={temperature}: this student samples by the noise of its masks, so each seed and each n gives "
                "another text; leave temperature at 0"
            )
        return NoisyMaskDecoder(student, forwards, step=step, promote=promote)
    if isinstance(student, MaskedStudent):
        given = {} if temperature is None else {"temperature": temperature}
        return MaskedDiffusionDecoder(student.body, forwards, **((masked_options or {}) | given))
    if forwards != 1:
        raise UsageError(
            f"forwards={forwards}: this student (module=logit_flow) takes one forward pass; type decoder=teacher for more"
        )
    return OneStepDecoder(student, temperature=temperature or 0.0)
