"""Says in words what is wrong with a text that an oracle corpus cannot say."""

from torch import Tensor

from datamodules.oracle.distribution import OracleDistribution
from datamodules.oracle.grammar import Slot, Template


def explain(distribution: OracleDistribution, text: Tensor, reveal: Tensor, words: list[str]) -> list[str]:
    """Faults of one text (R,) under what its prompt reveals (A,); [] where the text is valid.

    The template and, for each attribute, the value that excuse most words are taken as meant; every word that does not
    fit them is a fault, named with its place and with the word it disagrees with. `words[i]` is the word of token id i.
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
        places = [p for p, slot in enumerate(template.slots) if slot.attribute == attribute.name]
        allowed = [k for k in range(len(attribute.values)) if distribution.allowed[tau][a][k] > 0]
        fits = {k: [p for p in places if distribution.emission[tau][p][k, ids[p]] > 0] for k in allowed}
        if reveal[a] >= 0 and reveal[a] not in fits:
            faults.append(f"the prompt's {attribute.name}={attribute.values[reveal[a]]} needs another template")
            continue
        meant = reveal[a] if reveal[a] >= 0 else max(fits, key=lambda k: (len(fits[k]), -k))
        witness = fits[meant][0] if fits[meant] else None
        for place in places:
            if place not in fits[meant]:
                faults.append(_disagreement(template.slots[place], place, ids, words, meant, witness, reveal[a] >= 0))
    for place, slot in enumerate(template.slots):
        if slot.attribute is None and distribution.emission[tau][place][0, ids[place]] == 0:
            faults.append(f"word {place + 1} is “{words[ids[place]]}” where {slot.name} ({_choices(slot, 0)}) belongs")
    for place in range(len(template.slots), len(ids)):
        if ids[place] != distribution.eos_id:
            faults.append(f"word {place + 1} is “{words[ids[place]]}” after the end of the text")
    return faults


def _disagreement(
    slot: Slot, place: int, ids: list[int], words: list[str], meant: int, witness: int | None, revealed: bool
) -> str:
    fault = f"word {place + 1} ({slot.name}) is “{words[ids[place]]}”, not {_choices(slot, meant)}"
    if revealed:
        return fault + ", which the prompt asks for"
    if witness is None:
        return fault
    return fault + f", although word {witness + 1} is “{words[ids[witness]]}”"


def _choices(slot: Slot, value: int) -> str:
    return " or ".join(f"“{word}”" for word, _ in slot.words[value])
