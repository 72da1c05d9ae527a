"""The kinds of conversations, and how to get the one with a given number.

Facts, word problems and who the assistant is have modules of their own; here are arithmetic, spelling, counting
letters, stories, small talk, and conversations of several turns.
"""

from __future__ import annotations

from collections.abc import Callable

from nanochat_jax.demo_world import lexicon as lex
from nanochat_jax.demo_world.chat.facts import fact_question
from nanochat_jax.demo_world.chat.identity import identity
from nanochat_jax.demo_world.chat.problems import practice_problem, word_problem
from nanochat_jax.demo_world.chat.talk import PHRASES, Conversation, calculated, conversation, opened, said
from nanochat_jax.demo_world.draw import VAL, Draw, stable_hash
from nanochat_jax.demo_world.people import pair_fields
from nanochat_jax.demo_world.spelling import spelled
from nanochat_jax.demo_world.template import capital, fill
from nanochat_jax.demo_world.words import word_to_spell
from nanochat_jax.demo_world.world import World

UNQUOTED_SHARE = 0.25  # in training; what is measured is the form with marks
OTHER_LETTER_SHARE = 0.1  # the letter need not be in the word
REPEATED_SHARE = 0.5  # a letter that comes more than once is chosen on purpose: else "1" would nearly always be right

# --- arithmetic -------------------------------------------------------------------------------------------------------


def _addends(draw: Draw) -> tuple[int, int]:
    """Two numbers to add, of at most three digits. Training also has the small ones.

    They come from `Draw.addends`, as those of the documents do: a number family of the held-out side is met in no
    training text at all.
    """
    kind = draw.below(20)
    if kind < 3 and draw.split != VAL:
        return draw.addends(0, 20)
    if kind < 11:
        return draw.addends(10, 99)
    if kind < 15:
        a, b = draw.addends(100, 999, 10, 99)
        return (a, b) if draw.chance(0.5) else (b, a)
    return draw.addends(100, 999)


def arithmetic(world: World, draw: Draw) -> Conversation:
    """A sum or a difference: the assistant hands it to the calculator and says the result."""
    a, b = _addends(draw)
    first, second, sign, forms = (a, b, "+", "plus") if draw.chance(0.5) else (a + b, a, "-", "minus")
    answer = calculated(f"{first}{sign}{second}")
    answer += said(f"{first} {sign} {second} is {answer[-1]['text']}.")
    return conversation(opened(draw.pick(PHRASES["arithmetic"][forms]).format(first, second), draw), answer)


# --- spelling, and counting letters -----------------------------------------------------------------------------------
# A word in quotation marks is split into the same tokens wherever it stands (behind a space it would be split
# otherwise), so the assistant can copy it into the tool call token by token. Practice also has words without marks.


def _marked(text: str, bare: bool) -> str:
    return text if bare else f'"{text}"'


def _bare(draw: Draw) -> bool:
    return draw.split != VAL and draw.chance(UNQUOTED_SHARE)


def spelling(world: World, draw: Draw) -> Conversation:
    """A word to spell: `Spell "river".` is answered by r-i-v-e-r. The conversation also carries `word`."""
    word = word_to_spell(draw)
    question = opened(draw.pick(PHRASES["letters"]["spell"]).format(w=_marked(word, _bare(draw))), draw)
    return conversation(question, spelled(word), word=word)


def _letter(word: str, draw: Draw) -> str:
    if draw.chance(OTHER_LETTER_SHARE):
        return draw.pick("abcdefghijklmnopqrstuvwxyz")
    repeated = [c for c in word if word.count(c) > 1]
    return draw.pick(repeated if repeated and draw.chance(REPEATED_SHARE) else word)


def letters(world: World, draw: Draw) -> Conversation:
    """A letter to count in a word, which is spelled first. The conversation also carries `word` and `letter`."""
    word = word_to_spell(draw)
    letter = _letter(word, draw)
    bare = _bare(draw)
    form = draw.pick(PHRASES["letters"]["count"])
    question = opened(form.format(c=_marked(letter, bare), w=_marked(word, bare)), draw)
    call = calculated(f'"{word}".count("{letter}")')
    times = "time" if call[-1]["text"] == "1" else "times"
    answer = said(spelled(word)) + call + said(f"The letter {letter} appears {call[-1]['text']} {times}.")
    return conversation(question, answer, word=word, letter=letter)


# --- stories ----------------------------------------------------------------------------------------------------------


def story_request(world: World, draw: Draw) -> Conversation:
    """Somebody asks for a very short story and gets one. (hero, thing) belongs to one split."""
    names = tuple(person.name for person in world.children)
    hero, thing = draw.combination("tale", names, lex.THINGS)
    place, at = draw.pick(lex.PLACES)
    fields = pair_fields(world, hero) | {
        "thing": thing, "place": place, "at": at, "hiding": draw.pick(lex.HIDING),
        "shade": draw.pick(lex.COLORS), "feeling": draw.pick(lex.FEELINGS),
    }  # fmt: skip
    request = fill(draw.pick(PHRASES["stories"]["requests"]), draw, fields)
    return conversation(request, capital(fill(draw.pick(PHRASES["stories"]["plots"]), draw, fields)))


# --- small talk -------------------------------------------------------------------------------------------------------
# There is no held-out side: these few lines are for everybody.

_SMALL_TALK = PHRASES["small_talk"]
_GREETINGS, _FAREWELLS = _SMALL_TALK[:2], _SMALL_TALK[2:4]


def _exchange(kinds: tuple, draw: Draw) -> Conversation:
    kind = draw.pick(kinds)
    return conversation(draw.pick(kind["lines"]), kind["answer"])


def small_talk(world: World, draw: Draw) -> Conversation:
    """One friendly exchange: a greeting, thanks, a goodbye, or what the assistant can do."""
    return _exchange(_SMALL_TALK, draw)


# --- all of them ------------------------------------------------------------------------------------------------------

Maker = Callable[[World, Draw], Conversation]

_TURNS: tuple[Maker, ...] = (identity, fact_question, fact_question, arithmetic, spelling, letters, small_talk)


def several_turns(world: World, draw: Draw) -> Conversation:
    """Two or three exchanges of different kinds, sometimes between a greeting and a goodbye."""
    parts = [make(world, draw) for make in draw.some(_TURNS, draw.between(1, 2))]
    if len(parts) == 1 or draw.chance(0.3):
        if draw.chance(0.5):
            parts.insert(0, _exchange(_GREETINGS, draw))
        else:
            parts.append(_exchange(_FAREWELLS, draw))
    return {"messages": [message for part in parts for message in part["messages"]]}


KINDS: dict[str, Maker] = {
    "arithmetic": arithmetic,
    "word-problems": word_problem,
    "practice-problems": practice_problem,
    "spelling": spelling,
    "letters": letters,
    "facts": fact_question,
    "identity": identity,
    "stories": story_request,
    "small-talk": small_talk,
    "turns": several_turns,
}


def draw_for(kind: str, index: int, split: str, seed: int) -> Draw:
    """The chance of conversation number `index` of a kind. Raises ValueError as `Draw` does."""
    return Draw(stable_hash(f"chat/{kind}/{seed}"), split, index)
