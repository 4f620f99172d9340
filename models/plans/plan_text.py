"""Plans as a person reads and types them: "a=3 b=1", a type and its codes; "a=3,1" of two concepts, "a=3.1" of two levels.

A type that ended before its first concept is "a=none". Codes are numbered from 0. A code with a name is written by it, such as
name="The Mill", and can be typed either way; "code5" is the code of that number where another code has the name "5".
Legend: B batch, S slots.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence

from torch import Tensor

from models.functional.errors import UsageError
from models.plans.vocabulary import END, ConceptType, ConceptVocabulary

NOTHING = "none"
NUMBER = "code"
SHOWN = 40  # names in an error, at most

CodeNames = Mapping[str, Sequence[str]]  # of types with one concept of one level, the name of each code


def plan_texts(vocabulary: ConceptVocabulary, choices: Tensor, names: CodeNames | None = None) -> list[str]:
    """One line for each plan of choices (B, S)."""
    slots, known = list(zip(vocabulary.types, vocabulary.type_slots, strict=True)), names or {}
    return [
        " ".join(f"{t.name}={_codes(t, row[own].tolist(), known.get(t.name, ()))}" for t, own in slots)
        for row in choices
    ]


def parse_plan(vocabulary: ConceptVocabulary, typed: str, names: CodeNames | None = None) -> dict[int, int]:
    """{slot: choice} of the types that a plan names; the others are left open.

    Errors: UsageError for an unknown type, a code or a number of concepts that it does not have, and a quote without its end.
    """
    try:
        parts = shlex.split(typed)
    except ValueError as error:
        raise UsageError(
            f"plan: “{typed}” has a quote without its end; type for example plan='a=\"two words\"'"
        ) from error
    found: dict[int, int] = {}
    kinds = {t.name: (t, own) for t, own in zip(vocabulary.types, vocabulary.type_slots, strict=True)}
    for part in parts:
        name, _, codes = part.partition("=")
        if name not in kinds:
            raise UsageError(f"plan: “{part}” names no type; the types are {', '.join(kinds)}")
        t, own = kinds[name]
        if own.start in found:
            raise UsageError(f"plan: {name} is there twice; type its concepts with commas, such as {name}=0,1")
        for slot, choice in enumerate(_choices(t, codes, (names or {}).get(name, ())), own.start):
            found[slot] = choice
    return found


def _codes(t: ConceptType, choices: list[int], names: Sequence[str]) -> str:
    """The codes of a type's choices, up to its end; the name of one that has a printable name of its own."""
    name = names[choices[0] - 1] if 0 < choices[0] <= len(names) else ""
    if name.isprintable() and name and names.index(name) == choices[0] - 1:
        return name if re.fullmatch(r"[\w.,+-]+", name) else json.dumps(name, ensure_ascii=False)
    codes = [str(choice - 1) for choice in (choices[: choices.index(END)] if END in choices else choices)]
    concepts = [".".join(codes[at : at + t.levels]) for at in range(0, len(codes), t.levels)]
    typed = ",".join(concepts) or NOTHING
    while typed in names:
        typed = NUMBER + typed
    return typed


def _choices(t: ConceptType, codes: str, names: Sequence[str]) -> list[int]:
    """The choices behind a type's codes or the name of one, an end among them where there are fewer than the most."""
    if codes in names:
        return [1 + names.index(codes)]
    typed = codes
    while names and typed.startswith(NUMBER):
        typed = typed.removeprefix(NUMBER)
    concepts = [] if typed == NOTHING else [concept.split(".") for concept in typed.split(",")]
    numbers = [code for concept in concepts for code in concept]
    if any(len(concept) != t.levels for concept in concepts) or not all(
        code.isascii() and code.isdigit() and int(code) < t.codes for code in numbers
    ):
        wanted = f"a number from 0 to {t.codes - 1}" + (f" for each of its {t.levels} levels" if t.levels > 1 else "")
        wanted += f", or one of {', '.join(names[:SHOWN])}" if names else ""
        example = ".".join(["0"] * t.levels)
        raise UsageError(f"plan: “{t.name}={codes}” must be {wanted}; type for example plan='{t.name}={example}'")
    if not t.least <= len(concepts) <= t.most:
        count = str(t.most) if t.least == t.most else f"{t.least} to {t.most}"
        raise UsageError(f"plan: “{t.name}={codes}” has {len(concepts)} concepts; {t.name} needs {count}")
    return [int(code) + 1 for code in numbers] + [END] * (len(concepts) < t.most)
