"""Explains in words why an oracle corpus cannot give a text."""

from torch import Tensor

from datamodules.oracle.distribution import OracleDistribution
from datamodules.oracle.grammar import Slot, Template


def explain(distribution: OracleDistribution, text: Tensor, reveal: Tensor, words: list[str]) -> list[str]:
    """Faults of one text (R,) under what its prompt reveals (A,); [] where the text is valid.

    The template and, for each attribute, the value that excuse most words are taken as meant; every word that does not
    fit them is a fault, named with its position and with the word it disagrees with. `words[i]` is the word of token id i.
    """
    ids = text.tolist()
    readings = [
        _read(distribution, tau, template, ids, reveal.tolist(), words) for tau, template in _templates(distribution)
    ]
    return min(readings, key=len)


def _templates(distribution: OracleDistribution):
    return enumerate(distribution.grammar.templates)


def _read(
    distribution: OracleDistribution, tau: int, template: Template, ids: list[int], reveal: list[int], words: list[str]
) -> list[str]:
    faults: list[str] = []
    for attribute in distribution.grammar.attributes:
        a = distribution.index[attribute.name]
        positions = [p for p, slot in enumerate(template.slots) if slot.attribute == attribute.name]
        allowed = [k for k in range(len(attribute.values)) if distribution.allowed[tau][a][k] > 0]
        fits = {k: [p for p in positions if distribution.emission[tau][p][k, ids[p]] > 0] for k in allowed}
        if reveal[a] >= 0 and reveal[a] not in fits:
            faults.append(f"the prompt's {attribute.name}={attribute.values[reveal[a]]} needs another template")
            continue
        meant = reveal[a] if reveal[a] >= 0 else max(fits, key=lambda k: (len(fits[k]), -k))
        witness = fits[meant][0] if fits[meant] else None
        for position in positions:
            if position not in fits[meant]:
                faults.append(
                    _disagreement(template.slots[position], position, ids, words, meant, witness, reveal[a] >= 0)
                )
    for position, slot in enumerate(template.slots):
        if slot.attribute is None and distribution.emission[tau][position][0, ids[position]] == 0:
            faults.append(
                f"word {position + 1} is “{words[ids[position]]}” where {slot.name} ({_choices(slot, 0)}) belongs"
            )
    for position in range(len(template.slots), len(ids)):
        if ids[position] != distribution.eos_id:
            faults.append(f"word {position + 1} is “{words[ids[position]]}” after the end of the text")
    return faults


def _disagreement(
    slot: Slot, position: int, ids: list[int], words: list[str], meant: int, witness: int | None, revealed: bool
) -> str:
    fault = f"word {position + 1} ({slot.name}) is “{words[ids[position]]}”, not {_choices(slot, meant)}"
    if revealed:
        return fault + ", which the prompt asks for"
    if witness is None:
        return fault
    return fault + f", although word {witness + 1} is “{words[ids[witness]]}”"


def _choices(slot: Slot, value: int) -> str:
    return " or ".join(f"“{word}”" for word, _ in slot.words[value])
