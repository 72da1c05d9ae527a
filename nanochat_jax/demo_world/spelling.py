"""Spelling words and counting their letters. Each word is spelled on one side of the split only.

The word that is spelled stands in quotation marks: there it is split into the same tokens as in a conversation.
"""

from __future__ import annotations

from nanochat_jax.demo_world import lexicon as lex
from nanochat_jax.demo_world.draw import Draw
from nanochat_jax.demo_world.lexicon import number_word
from nanochat_jax.demo_world.tables import read_table
from nanochat_jax.demo_world.template import article, fill
from nanochat_jax.demo_world.words import word_to_spell
from nanochat_jax.demo_world.world import World

_PHRASES = read_table("documents")
_TIMES = {0: "zero times", 1: "one time"}


def spelled(word: str, separator: str = "-") -> str:
    """The letters of `word` one by one: "r-i-v-e-r"."""
    return separator.join(word)


def times(n: int) -> str:
    """ "one time", "three times"."""
    return _TIMES.get(n) or f"{number_word(n)} times"


def counting_walk(word: str, letter: str) -> str:
    """`word` letter by letter, counting `letter`: "p, e (1), b, b, l, e (2)"."""
    out, seen = [], 0
    for c in word:
        if c == letter:
            seen += 1
            out.append(f"{c} ({seen})")
        else:
            out.append(c)
    return ", ".join(out)


def _line(word: str, draw: Draw) -> str:
    fields = {
        "word": word, "spelled": spelled(word), "letters": spelled(word, ", "), "n": number_word(len(word)),
        "first": word[0], "last": word[-1],
    }  # fmt: skip
    return fill(draw.pick(_PHRASES["spelling"]["lines"]), draw, fields)


def spelling(world: World, draw: Draw) -> str:
    """A page of spelled words."""
    return "\n".join(_line(word_to_spell(draw), draw) for _ in range(draw.between(4, 8)))


def _letter_line(word: str, draw: Draw) -> str:
    letter = draw.pick(word) if draw.chance(0.9) else draw.pick("aeioust")
    fields = {
        "word": word, "letter": letter, "spelled": spelled(word), "walk": counting_walk(word, letter),
        "times": times(word.count(letter)),
    }  # fmt: skip
    return fill(draw.pick(_PHRASES["letter_counting"]["lines"]), draw, fields)


def letter_counting(world: World, draw: Draw) -> str:
    """A page in which letters are counted."""
    return "\n".join(_letter_line(word_to_spell(draw), draw) for _ in range(draw.between(3, 6)))


def spelling_bee(world: World, draw: Draw) -> str:
    """Two friends ask each other to spell words."""
    person = draw.pick(world.children)
    pair = (person.name, person.friend)
    out = [f"{pair[0]} and {pair[1]} play a spelling game."]
    for i in range(draw.between(3, 5)):
        word = word_to_spell(draw)
        asks, answers = pair[i % 2], pair[1 - i % 2]
        praise = draw.pick(_PHRASES["spelling"]["praise"])
        out.append(f'"Please spell {word}," said {asks}. "{spelled(word)}," said {answers}. "{praise}!"')
    return "\n".join(out)


def alphabet(world: World, draw: Draw) -> str:
    """The alphabet and what begins with its letters. Whole words only: nothing is spelled here."""
    nouns = [w for w in {*lex.THINGS, *(a.kind for a in lex.ANIMALS), *(c[0] for c in lex.COUNTABLE)} if " " not in w]
    chosen = sorted(draw.selection("alphabet", sorted(nouns), draw.between(5, 8)))
    lines = [f"{w[0].upper()} is for {w}." for w in chosen]
    order = f"In the order of the alphabet these are {', '.join(article(w) for w in chosen)}."
    return " ".join([*lines, order] if draw.chance(0.4) else lines)


def places_of_typos(text: str) -> list[int]:
    """Where `mistyped` may change `text`: inside words."""
    return [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]


def mistyped(text: str, place: int, typo: int, letter: str) -> str:
    """`text` with the letter at `place` dropped (`typo` 0), doubled (1), exchanged with the next (2) or replaced by
    `letter` (3)."""
    instead = ("", text[place] * 2, text[place + 1] + text[place], letter)[typo]
    return text[:place] + instead + text[place + (2 if typo == 2 else 1) :]
