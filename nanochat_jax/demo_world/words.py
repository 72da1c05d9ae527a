"""The words that are spelled and whose letters are counted: real ones, and made-up ones for practice.

A model that sees subword pieces can spell a new word only if it has seen the word's pieces spelled. So practice has
the words of the world, the plain words of the Python prose, and made-up words; what is held out are real words only.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from nanochat_jax.demo_world import lexicon as lex
from nanochat_jax.demo_world.draw import TRAIN, VAL, Draw, word_side
from nanochat_jax.demo_world.prose import python_prose
from nanochat_jax.text.calculator import use_calculator

MADE_UP_SHARE = 0.5
SYLLABLES_SHARE = 0.2  # of the made-up words; the others, crossed from two real ones, have more of the usual pieces
_PLAIN = re.compile(r"(?<![\w'-])[a-z]{3,12}(?![\w'-])")
_VOWEL = re.compile(r"[aeiouy]")


@lru_cache(maxsize=1)
def spelling_words() -> tuple[str, ...]:
    """All words that the world spells: lower case, three to twelve letters, sorted."""
    phrases = [*lex.FOODS, *lex.COLORS, *lex.PET_KINDS, *lex.HOBBIES, *lex.THINGS, *lex.FRUITS, *lex.VEGETABLES]
    phrases += [*lex.FLOWERS, *lex.SPELLING_EXTRA, *(w for pair in lex.COUNTABLE for w in pair)]
    phrases += [f"{a.kind} {a.group} {a.young}" for a in lex.ANIMALS] + [j.name for j in lex.JOBS]
    phrases += [place for place, _ in lex.PLACES]
    words = {w for phrase in phrases for w in phrase.split() if w.isalpha() and w.islower() and 3 <= len(w) <= 12}
    return tuple(sorted(words - {"the", "and"}))


def _countable(word: str) -> bool:
    """Whether the calculator takes the word; it refuses those that hide "open", "file", "dir" and some others."""
    return use_calculator(f'"{word}".count("a")') is not None


@lru_cache(maxsize=1)
def real_words() -> tuple[str, ...]:
    """The world's words and the words that the prose has at least twice, 3 to 12 lower-case letters, sorted.

    The prose depends on the Python version, the words of the world do not.
    """
    prose = Counter(word for document in python_prose() for word in _PLAIN.findall(document))
    words = {word for word, n in prose.items() if n > 1 and _VOWEL.search(word)} | set(spelling_words())
    return tuple(sorted(word for word in words if _countable(word)))


@lru_cache(maxsize=2)
def words_of(split: str) -> tuple[str, ...]:
    """The real words of one side."""
    return tuple(word for word in real_words() if word_side(word) == split)


def _syllables(draw: Draw) -> str:
    word = "".join(
        draw.pick(lex.MADE_UP["starts"]) + draw.pick(lex.MADE_UP["middles"]) for _ in range(draw.between(1, 2))
    )
    return word + draw.pick(lex.MADE_UP["ends"])


def _crossed(draw: Draw) -> str:
    """The beginning of one practice word and the end of another, each at least two letters long."""
    first, second = draw.pick(words_of(TRAIN)), draw.pick(words_of(TRAIN))
    return first[: draw.between(2, len(first))] + second[draw.between(0, len(second) - 2) :]


def made_up_word(draw: Draw) -> str:
    """A word that does not exist and may be practiced: 3 to 12 letters, on the training side."""
    while True:
        word = _syllables(draw) if draw.chance(SYLLABLES_SHARE) else _crossed(draw)
        if 3 <= len(word) <= 12 and word_side(word) == TRAIN and _countable(word):
            return word


def word_to_spell(draw: Draw) -> str:
    """A word for this split: made up or real in training, real where held out."""
    if draw.split != VAL and draw.chance(MADE_UP_SHARE):
        return made_up_word(draw)
    return draw.pick(words_of(draw.split))
