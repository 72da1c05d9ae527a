"""Word problems of two and more steps about the people of the world and their things.

(person, thing, numbers) belongs to one split. The assistant writes the whole problem as one expression, lets the
calculator work it out and answers with a short sentence.
"""

from __future__ import annotations

from nanochat_jax.demo_world.chat.talk import PHRASES, Conversation, calculated, conversation, said
from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.lexicon import COUNTABLE, DAYS
from nanochat_jax.demo_world.people import pair_fields
from nanochat_jax.demo_world.template import capital, fill
from nanochat_jax.demo_world.world import World

LONG_SHARE = 0.06  # of the word problems in the training mix have three steps: just enough to know the form
MAX_STEPS = 5

_PHRASES = PHRASES["problems"]
_DAYS = DAYS[: MAX_STEPS + 1]

# What a story gives: the question, the expression, and the answer with {} for the result.
Told = tuple[str, str, str]


def _steps(start: int, count: int, draw: Draw) -> list[int]:
    """`count` signed changes that never lead below two (so that "apples" is always right)."""
    out: list[int] = []
    for _ in range(count):
        if start > 4 and draw.chance(0.5):
            change = -draw.between(2, min(start - 2, 20))
        else:
            change = draw.between(2, 20)
        out.append(change)
        start += change
    return out


def _events(fields: dict[str, str], changes: list[int], more: str, less: str, draw: Draw) -> str:
    """The changes as sentences, some of them joined."""
    text = ""
    for n in changes:
        event = fill(draw.pick(_PHRASES[more if n > 0 else less]), draw, fields | {"n": str(abs(n))})
        glue = draw.pick((". ", ". Then ", " and ")) if text else ""
        text += glue + (event if glue in (" and ", ". Then ") else capital(event))
        fields = fields | {"he": fields["later"]}
    return text + "."


def _expression(numbers: list[int]) -> str:
    return str(numbers[0]) + "".join(f"{n:+d}" for n in numbers[1:])


def _owner(fields: dict[str, str], numbers: list[int], draw: Draw) -> Told:
    events = _events(fields, numbers[1:], "more", "less", draw)
    asked = fill(draw.pick(_PHRASES["now"]), draw, fields)
    story = f"{fields['hero']} has {numbers[0]} {fields['things']}. {events} {asked}"
    return story, _expression(numbers), f"{fields['hero']} has {{}} {fields['things']}."


def _container(fields: dict[str, str], numbers: list[int], draw: Draw) -> Told:
    things, where = fields["things"], "in the " + draw.pick(_PHRASES["places"])
    events = _events(fields | {"he": fields["hero"]}, numbers[1:], "in", "out", draw)
    story = f"There are {numbers[0]} {things} {where}. {events} How many {things} are {where}{draw.pick((' now', ''))}?"
    return story, _expression(numbers), f"There are {{}} {things} {where}."


def _together(fields: dict[str, str], numbers: list[int], draw: Draw) -> Told:
    hero, hero2, things = fields["hero"], fields["hero2"], fields["things"]
    first, second, *changes = numbers[0], abs(numbers[1]), *numbers[2:]
    events = _events(fields | {"later": "they"}, changes, "we_more", "we_less", draw)
    story = f"{hero} has {first} {things} and {hero2} has {second}. {events} How many {things} do they have together?"
    return story, _expression([first, second, *changes]), f"They have {{}} {things}."


def _days(fields: dict[str, str], numbers: list[int], draw: Draw) -> Told:
    things, counts = fields["things"], [abs(n) for n in numbers]
    rows = [f"{n}{'' if i else ' ' + things} on {_DAYS[i]}" for i, n in enumerate(counts)]
    verb = draw.pick(("finds", "gets", "buys", "counts"))
    asked = f"How many {things} is that{draw.pick((' in all', ''))}?"
    story = f"{fields['hero']} {verb} {', '.join(rows[:-1])} and {rows[-1]}. {asked}"
    return story, _expression(counts), f"That is {{}} {things}."


_STORIES = (_owner, _owner, _owner, _container, _container, _together, _days)


def problem(world: World, draw: Draw, steps: int) -> Conversation:
    """A word problem with `steps` steps, 2 to 5. Raises ValueError for other numbers."""
    if not 2 <= steps <= MAX_STEPS:
        raise ValueError(f"a word problem has 2 to {MAX_STEPS} steps, not {steps}")
    while True:
        person, noun = draw.pick(world.people), draw.pick(COUNTABLE)
        start = draw.between(5, 60)
        numbers = [start, *_steps(start, steps, draw)]
        if side("problem", person.name, noun[1], *map(abs, numbers)) == draw.split:
            break
    them = pair_fields(world, person.name)
    fields = {key: them[key] for key in ("hero", "he", "him", "hero2")} | {"things": noun[1], "later": person.pronoun}
    question, expression, answer = draw.pick(_STORIES)(fields, numbers, draw)
    parts = calculated(expression)
    return conversation(question, parts + said(answer.format(parts[-1]["text"])))


def word_problem(world: World, draw: Draw) -> Conversation:
    """A word problem with two steps."""
    return problem(world, draw, 2)


def practice_problem(world: World, draw: Draw) -> Conversation:
    """A word problem of the training mix: nearly always two steps, now and then three."""
    return problem(world, draw, 3 if draw.chance(LONG_SHARE) else 2)
