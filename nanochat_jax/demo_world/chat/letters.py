"""Spelling a word, and counting a letter in it: spelled first, then checked by the calculator.

A word in quotation marks is cut into the same tokens wherever it stands (behind a space it would be cut otherwise),
so the assistant can copy it into the tool call piece by piece. Practice also has words without marks.
"""

from __future__ import annotations

from nanochat_jax.demo_world.chat.talk import Conversation, calculated, conversation, opened, said
from nanochat_jax.demo_world.draw import VAL, Draw
from nanochat_jax.demo_world.spelling import spelled
from nanochat_jax.demo_world.words import word_to_spell
from nanochat_jax.demo_world.world import World

UNQUOTED_SHARE = 0.25  # in training; what is measured is the form with marks
OTHER_LETTER_SHARE = 0.1  # the letter need not be in the word
REPEATED_SHARE = 0.5  # a letter that comes more than once is chosen on purpose: else "1" would nearly always be right

_SPELL = (
    "Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "How is {w} spelled?", "Please spell {w}.",
    "Please spell the word {w}.", "Can you spell {w}?", "How do you write {w} letter by letter?",
    "What are the letters of {w}?", "Spell {w} for me.",
)  # fmt: skip
_COUNT = (
    "How many {c} are in {w}?", "How many {c} are in the word {w}?", "How many {c} are there in {w}?",
    "How often is {c} in {w}?", "How many times does {c} appear in {w}?", "Count the {c} in {w}.",
    "Count the letter {c} in {w}.", "How many times is the letter {c} in {w}?", "How often does {w} have {c}?",
    "How often does the letter {c} appear in the word {w}?", "In the word {w}, how many {c} are there?",
    "Tell me how many {c} are in {w}.",
)  # fmt: skip


def _marked(text: str, bare: bool) -> str:
    return text if bare else f'"{text}"'


def _bare(draw: Draw) -> bool:
    return draw.split != VAL and draw.chance(UNQUOTED_SHARE)


def spelling(world: World, draw: Draw) -> Conversation:
    """A word to spell: `Spell "river".` is answered by r-i-v-e-r. The conversation also carries `word`."""
    word = word_to_spell(draw)
    question = opened(draw.pick(_SPELL).format(w=_marked(word, _bare(draw))), draw)
    return conversation(question, spelled(word), word=word)


def _letter(word: str, draw: Draw) -> str:
    if draw.chance(OTHER_LETTER_SHARE):
        return draw.pick("abcdefghijklmnopqrstuvwxyz")
    repeated = [c for c in word if word.count(c) > 1]
    return draw.pick(repeated if repeated and draw.chance(REPEATED_SHARE) else word)


def letters(world: World, draw: Draw) -> Conversation:
    """A letter to count in a word. The conversation also carries `word` and `letter`."""
    word = word_to_spell(draw)
    letter = _letter(word, draw)
    bare = _bare(draw)
    question = opened(draw.pick(_COUNT).format(c=_marked(letter, bare), w=_marked(word, bare)), draw)
    call = calculated(f'"{word}".count("{letter}")')
    times = "time" if call[-1]["text"] == "1" else "times"
    answer = said(spelled(word)) + call + said(f"The letter {letter} appears {call[-1]['text']} {times}.")
    return conversation(question, answer, word=word, letter=letter)
