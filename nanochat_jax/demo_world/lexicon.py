"""The words from which the world is made, by name: what lexicon.toml has, and whole numbers in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nanochat_jax.demo_world.tables import read_table


@dataclass(frozen=True, slots=True)
class Town:
    """A town: all texts are as they stand behind "the", "is known for" or "in the middle is"."""

    name: str
    region: str
    river: str
    hill: str
    known_for: str
    landmark: str
    market_day: str


@dataclass(frozen=True, slots=True)
class Animal:
    """A kind of animal. `sound` is a verb ("barks"), `home` has its article, `can` follows "can"."""

    kind: str
    group: str
    sound: str
    food: str
    home: str
    legs: int
    covering: str
    young: str
    can: str


@dataclass(frozen=True, slots=True)
class Profession:
    """A job: where it is done ("in a bakery"), what is done (a verb phrase), and the tool with its article."""

    name: str
    workplace: str
    work: str
    tool: str


Words = tuple[str, ...]
Pairs = tuple[tuple[str, str], ...]
_WORDS = read_table("lexicon")

CHILDREN: Pairs = _WORDS["children"]
ADULTS: Pairs = _WORDS["adults"]
JOBS: tuple[Profession, ...] = tuple(Profession(*row) for row in _WORDS["jobs"])
TOWNS: tuple[Town, ...] = tuple(Town(*row) for row in _WORDS["towns"])
ANIMALS: tuple[Animal, ...] = tuple(Animal(*row) for row in _WORDS["animals"])
FOODS: Words = _WORDS["foods"]
COLORS: Words = _WORDS["colors"]
PET_KINDS: Words = _WORDS["pet_kinds"]
PET_NAMES: Words = _WORDS["pet_names"]
HOBBIES: Words = _WORDS["hobbies"]
FEELINGS: Words = _WORDS["feelings"]
PLACES: Pairs = _WORDS["places"]
THINGS: Words = _WORDS["things"]
HIDING: Words = _WORDS["hiding"]
FRUITS: Words = _WORDS["fruits"]
VEGETABLES: Words = _WORDS["vegetables"]
FLOWERS: Words = _WORDS["flowers"]
COUNTABLE: Pairs = _WORDS["countable"]
SPELLING_EXTRA: Words = tuple(_WORDS["spelling_extra"].split())
MADE_UP: Mapping[str, Words] = {part: tuple(text.split()) for part, text in _WORDS["made_up"].items()}

DAYS: Words = _WORDS["days"]
MONTHS: Words = _WORDS["months"]
PLANETS: Words = _WORDS["planets"]
ORDINALS: Words = _WORDS["ordinals"]
BY_HEART: Mapping[str, Words] = {
    name: _WORDS[name] for name in ("planets", "days", "months", "seasons", "rainbow", "senses", "continents")
}
GENERAL: Mapping[str, Pairs] = _WORDS["general"]

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_word(n: int) -> str:
    """`n` in words, for 0 <= n <= 9999: 47 -> "forty-seven", 120 -> "one hundred twenty". ValueError outside."""
    if not 0 <= n <= 9999:
        raise ValueError(f"number_word knows the numbers 0 to 9999, not {n}")
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + ("-" + _ONES[n % 10] if n % 10 else "")
    unit, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = " " + number_word(n % unit) if n % unit else ""
    return f"{number_word(n // unit)} {name}{rest}"
