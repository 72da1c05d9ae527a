"""Word problems of two and more steps about the people of the world and their things.

(person, thing, numbers) belongs to one split. The assistant writes the whole problem as one expression, lets the
calculator work it out and answers with a short sentence.
"""

from __future__ import annotations

from nanochat_jax.world.chance import Draw, side
from nanochat_jax.world.chat.talk import Conversation, calculated, conversation, said
from nanochat_jax.world.lexicon import COUNTABLE
from nanochat_jax.world.people import pair_fields
from nanochat_jax.world.template import capital, fill
from nanochat_jax.world.world import World

LONG_SHARE = 0.06  # of the word problems in the training mix have three steps: just enough to know the form
MAX_STEPS = 5

# What happens to the things of {hero}; {n} is a number.
_MORE = (
    "{he} finds {n} more", "{he} buys {n} more", "{he} gets {n} more from {hero2}", "{hero2} gives {him} {n} more",
    "{he} picks up {n} more", "{he} wins {n} more",
)  # fmt: skip
_LESS = (
    "{he} gives {n} to {hero2}", "{he} loses {n}", "{he} sells {n}", "{he} gives away {n}", "{hero2} takes {n}",
    "{he} drops {n} in the river",
)  # fmt: skip
_NOW = ("How many {things} does {hero} have now?", "How many {things} does {hero} have?")
_PLACES = ("basket", "box", "bag", "drawer", "jar")
_IN = ("{hero} puts in {n} more", "{hero2} puts in {n} more", "{hero2} adds {n}")
_OUT = ("{hero} takes out {n}", "{hero2} takes out {n}", "{hero2} takes {n} of them")


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


def _told(sentences: list[str], draw: Draw) -> str:
    """Events as sentences, some of them joined."""
    text = capital(sentences[0])
    for sentence in sentences[1:]:
        glue = draw.pick((". ", ". Then ", " and "))
        text += glue + (capital(sentence) if glue == ". " else sentence)
    return text + "."


def _events(fields: dict[str, str], changes: list[int], forms: tuple, draw: Draw) -> str:
    more, less = forms
    events = [fill(draw.pick(more if n > 0 else less), draw, fields | {"n": str(abs(n))}) for n in changes]
    return _told(events, draw)


def _expression(start: str, changes: list[int]) -> str:
    return start + "".join(f"{n:+d}" for n in changes)


def _owner(fields: dict[str, str], numbers: list[int], draw: Draw) -> tuple[str, str, str]:
    start, *changes = numbers
    story = f"{fields['hero']} has {start} {fields['things']}. {_events(fields, changes, (_MORE, _LESS), draw)}"
    question = fill(draw.pick(_NOW), draw, fields)
    return f"{story} {question}", _expression(str(start), changes), f"{fields['hero']} has {{}} {fields['things']}."


def _container(fields: dict[str, str], numbers: list[int], draw: Draw) -> tuple[str, str, str]:
    start, *changes = numbers
    where = "in the " + draw.pick(_PLACES)
    story = f"There are {start} {fields['things']} {where}. {_events(fields, changes, (_IN, _OUT), draw)}"
    question = f"How many {fields['things']} are {where}{draw.pick((' now', ''))}?"
    return f"{story} {question}", _expression(str(start), changes), f"There are {{}} {fields['things']} {where}."


def _days(fields: dict[str, str], numbers: list[int], draw: Draw) -> tuple[str, str, str]:
    names = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
    verb = draw.pick(("finds", "gets", "buys", "counts"))
    rows = [f"{abs(n)}{' ' + fields['things'] if i == 0 else ''} on {names[i]}" for i, n in enumerate(numbers)]
    story = f"{fields['hero']} {verb} {', '.join(rows[:-1])} and {rows[-1]}."
    expression = "+".join(str(abs(n)) for n in numbers)
    question = draw.pick((f"How many {fields['things']} is that?", f"How many {fields['things']} is that in all?"))
    return f"{story} {question}", expression, f"That is {{}} {fields['things']}."


_STORIES = (_owner, _owner, _owner, _container, _container, _days)


def problem(world: World, draw: Draw, steps: int) -> Conversation:
    """A word problem with `steps` steps, 2 to 5. Raises ValueError for other numbers."""
    if not 2 <= steps <= MAX_STEPS:
        raise ValueError(f"a word problem has 2 to {MAX_STEPS} steps, not {steps}")
    while True:
        person, noun = draw.pick(world.people), draw.pick(COUNTABLE)
        start = draw.between(5, 60)
        numbers = [start, *_steps(start, steps, draw)]
        if side("problem", person.name, noun[1], *numbers) == draw.split:
            break
    fields = {k: v for k, v in pair_fields(world, person.name).items() if k in ("hero", "he", "him", "hero2")}
    fields["things"] = noun[1]
    question, expression, answer = draw.pick(_STORIES)(fields, numbers, draw)
    parts = calculated(expression)
    return conversation(question, parts + said(answer.format(parts[-1]["text"])))


def word_problem(world: World, draw: Draw) -> Conversation:
    """A word problem with two steps."""
    return problem(world, draw, 2)


def practice_problem(world: World, draw: Draw) -> Conversation:
    """A word problem of the training mix: nearly always two steps, now and then three."""
    return problem(world, draw, 3 if draw.chance(LONG_SHARE) else 2)
