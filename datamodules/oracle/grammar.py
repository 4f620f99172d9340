"""The words of an oracle corpus: a hidden plan of typed attributes, and templates that put it into words.

A plan is one value for each attribute, sampled independently. A template is a row of slots; each slot gives one word, sampled
from the words of one attribute's value (or of no attribute: a free or constant word). A lookup (the baker's name gives
"baker"), a copy (the name once more) and a synonym are all slots of the same attribute. A template may be restricted to
some values of an attribute: that is how an event list of n events gets a text of its own length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

Words = tuple[tuple[str, float], ...]  # words and their probabilities


@dataclass(frozen=True)
class Attribute:
    """A typed part of the plan with its values and their probabilities (normalised on use)."""

    name: str
    values: tuple[str, ...]
    prior: tuple[float, ...]


@dataclass(frozen=True)
class Slot:
    """One token of the text. `words[k]` are the words for value k of `attribute`; one entry where attribute is None."""

    name: str
    attribute: str | None
    words: tuple[Words, ...]


@dataclass(frozen=True)
class Template:
    """A row of slots; `only` restricts it to some values (by index) of some attributes."""

    name: str
    weight: float
    slots: tuple[Slot, ...]
    only: dict[str, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Grammar:
    attributes: tuple[Attribute, ...]
    templates: tuple[Template, ...]


# -- small builders that keep the corpora below readable -------------------------------------------------------------


def constant(word: str) -> Slot:
    return Slot(f"“{word}”", None, (((word, 1.0),),))


def free(name: str, **words: float) -> Slot:
    """A word that does not depend on the plan."""
    return Slot(name, None, (tuple(words.items()),))


def word_of(attribute: Attribute, words: Sequence[str] | None = None, name: str | None = None) -> Slot:
    """The attribute's value, or `words[k]` instead of it; "a|b" are synonyms with probability 0.8 and 0.2."""
    chosen = (words or attribute.values)[: len(attribute.values)]
    return Slot(name or attribute.name, attribute.name, tuple(_synonyms(w) for w in chosen))


def zipf(n: int) -> tuple[float, ...]:
    """Weights 1/(k + 2): unequal, so that a method which levels them is seen."""
    return tuple(1.0 / (k + 2) for k in range(n))


def with_style(grammar: Grammar, first: float) -> Grammar:
    """The same plans and texts, the first of several words with probability `first` wherever there is a choice."""

    def styled(slot: Slot) -> Slot:
        return replace(slot, words=tuple(_reweighted(words, first) for words in slot.words))

    return replace(grammar, templates=tuple(replace(t, slots=tuple(map(styled, t.slots))) for t in grammar.templates))


def _reweighted(words: Words, first: float) -> Words:
    if len(words) == 1:
        return words
    rest = sum(weight for _, weight in words[1:])
    return ((words[0][0], first), *((word, (1 - first) * weight / rest) for word, weight in words[1:]))


def choices(grammar: Grammar) -> tuple[set[str], set[str]]:
    """Words that are the first of several, and the others, over all slots."""
    several = [words for t in grammar.templates for s in t.slots for words in s.words if len(words) > 1]
    return {words[0][0] for words in several}, {word for words in several for word, _ in words[1:]}


def _synonyms(words: str) -> Words:
    first, *rest = words.split("|")
    return ((first, 0.8), (rest[0], 0.2)) if rest else ((first, 1.0),)


# -- the three corpora ----------------------------------------------------------------------------------------------

_WHO = ("anna", "boris", "clara", "david", "elena", "felix", "greta", "hugo", "irina", "jonas", "karla", "lukas")
_JOB = (
    "baker",
    "sailor",
    "doctor",
    "painter",
    "judge",
    "miner",
    "pilot",
    "tailor",
    "singer",
    "farmer",
    "nurse",
    "smith",
)
_WHERE = (
    "paris",
    "london",
    "rome",
    "vienna",
    "cairo",
    "cologne",
    "prague",
    "seville",
    "warsaw",
    "lisbon",
    "dublin",
    "riga",
)
_RIVER = (
    "seine",
    "thames",
    "tiber",
    "danube",
    "nile",
    "rhine",
    "moldau",
    "betis",
    "vistula",
    "tagus",
    "liffey",
    "daugava",
)
_WHAT = ("apples", "lamps", "boots", "scarves", "maps", "clocks", "drums", "knives", "ropes", "kites", "bells", "vases")
_LOOK = ("red", "brass", "old", "silk", "torn", "loud", "tin", "sharp", "long", "paper", "small", "blue")
_MOOD = ("glad|happy", "sad|gloomy", "calm|quiet", "angry|cross")
_EVENTS = ("rain|drizzle", "music|singing", "fire|flames", "snow|sleet", "thunder|storm")
_NUMBER = ("one", "two", "three", "four")


def _attribute(name: str, values: Sequence[str], n: int) -> Attribute:
    return Attribute(name, tuple(v.split("|")[0] for v in values[:n]), zipf(n))


def tiny() -> Grammar:
    """CPU-seconds: every text can be listed. Two templates and one or two events in either order give four lengths."""
    who, where = _attribute("who", _WHO, 3), _attribute("where", _WHERE, 2)
    events = _event_orders(("rain", "music"), most=2)
    templates = []
    for count in (1, 2):
        only = {"events": _orders_of_length(events, count)}
        heard = [_event_slot(events, ("rain|drizzle", "music"), k) for k in range(count)]
        templates += [
            Template(
                f"heard {count}",
                0.7,
                (word_of(who), free("verb", heard=0.6, saw=0.4), *heard, word_of(where)),
                only,
            ),
            Template(
                f"in {count}",
                0.3,
                (constant("in"), word_of(where), word_of(where, _RIVER), word_of(who), *heard),
                only,
            ),
        ]
    return Grammar((who, where, events), tuple(templates))


def small() -> Grammar:
    """CPU-minutes: 16 words in fixed positions, 128 plans, copies and lookups, two positions with synonyms; 512 texts.

    "anna the baker went to paris and bought red apples . anna felt glad near seine"
    """
    who, where, what = _attribute("who", _WHO, 4), _attribute("where", _WHERE, 4), _attribute("what", _WHAT, 4)
    mood = _attribute("mood", _MOOD, 2)
    slots = (
        word_of(who),
        constant("the"),
        word_of(who, _JOB, "job"),
        free("verb", went=0.8, flew=0.2),
        constant("to"),
        word_of(where),
        constant("and"),
        constant("bought"),
        word_of(what, _LOOK, "look"),
        word_of(what),
        constant("."),
        word_of(who, name="who again"),
        constant("felt"),
        word_of(mood, _MOOD),
        constant("near"),
        word_of(where, _RIVER, "river"),
    )
    return Grammar((who, where, what, mood), (Template("journey", 1.0, slots),))


def large() -> Grammar:
    """GPU: 1.4 million plans, three templates, one to four events in any order, agreement over 30 words and more."""
    who, where, what = _attribute("who", _WHO, 12), _attribute("where", _WHERE, 12), _attribute("what", _WHAT, 12)
    mood = _attribute("mood", _MOOD, 4)
    events = _event_orders(tuple(e.split("|")[0] for e in _EVENTS), most=4)
    job, river, look = word_of(who, _JOB, "job"), word_of(where, _RIVER, "river"), word_of(what, _LOOK, "look")
    again, feels = word_of(who, name="who again"), word_of(mood, _MOOD)
    verb, first = free("verb", went=0.5, flew=0.3, rode=0.2), _event_slot(events, _EVENTS, 0, "first event again")
    howmany = Slot("number of events", "events", tuple(((_NUMBER[len(v.split("+")) - 1], 1.0),) for v in events.values))
    things = Slot("thing or things", "events", tuple(((f"thing{'s' * ('+' in v)}", 1.0),) for v in events.values))
    w = constant
    templates = []
    for count in range(1, 5):
        only = {"events": _orders_of_length(events, count)}
        event_words: list[Slot] = []
        for k in range(count):
            event_words += [w("then"), _event_slot(events, _EVENTS, k)]
        journey = (
            *(
                word_of(who),
                w("the"),
                job,
                verb,
                w("to"),
                word_of(where),
                w("and"),
                free("got", bought=0.6, found=0.4),
            ),
            *(look, word_of(what), w(".")),
            *(w("there"), w("came"), howmany, things, w(":"), *event_words, w(".")),
            *(again, w("felt"), feels, w("near"), w("the"), river, w("after"), w("the"), first),
            *(w("and"), w("kept"), w("the"), word_of(what, name="what again"), w(".")),
        )
        letter = (
            *(
                w("dear"),
                word_of(who),
                w(","),
                w("in"),
                word_of(where),
                w("i"),
                free("got", bought=0.6, found=0.4),
            ),
            *(look, word_of(what), w("for"), w("a"), job, w(".")),
            *(howmany, things, w("came"), w(":"), *event_words, w(".")),
            *(w("by"), w("the"), river, w("i"), w("am"), feels, w("since"), w("the"), first),
            *(w("."), w("keep"), w("the"), word_of(what, name="what again"), again, w(".")),
        )
        news = (
            *(w("news"), w("from"), word_of(where), w(":"), howmany, things, *event_words, w(".")),
            *(w("a"), feels, job, w("sold"), look, word_of(what), w("by"), w("the"), river),
            *(w("."), w("after"), w("the"), first, again, w("wept"), w(".")),
        )
        for name, weight, slots in (("journey", 0.5, journey), ("letter", 0.3, letter), ("news", 0.2, news)):
            templates.append(Template(f"{name} {count}", weight, slots, only))
    return Grammar((who, where, what, mood, events), tuple(templates))


SIZES = {"tiny": tiny, "small": small, "large": large}


def _event_orders(names: tuple[str, ...], most: int) -> Attribute:
    """Every ordered choice of 1 to `most` different events, longer lists rarer."""
    orders = [order for n in range(1, most + 1) for order in permutations(names, n)]
    counts = [sum(len(o) == n for o in orders) for n in range(1, most + 1)]
    prior = [1.0 / (len(order) + 1) / counts[len(order) - 1] for order in orders]
    return Attribute("events", tuple("+".join(order) for order in orders), tuple(prior))


def _orders_of_length(events: Attribute, count: int) -> frozenset[int]:
    return frozenset(k for k, value in enumerate(events.values) if len(value.split("+")) == count)


def _event_slot(events: Attribute, words: Sequence[str], position: int, name: str | None = None) -> Slot:
    """The word of the event in this position; orders too short for it never use the template that has the slot."""
    by_name = {w.split("|")[0]: _synonyms(w) for w in words}
    chosen = []
    for value in events.values:
        order = value.split("+")
        chosen.append(by_name[order[min(position, len(order) - 1)]])
    return Slot(name or f"event {position + 1}", "events", tuple(chosen))
