"""Word problems: little stories in which something is given, found, shared or counted, always with a true end."""

from __future__ import annotations

from nanochat_jax.demo_world.draw import VAL, Draw
from nanochat_jax.demo_world.lexicon import COUNTABLE
from nanochat_jax.demo_world.number_words import number_word
from nanochat_jax.demo_world.people import pair_fields
from nanochat_jax.demo_world.template import capital, fill
from nanochat_jax.demo_world.world import World

# The first number is {a}, the second {b}, their sum {c}; {ta}, {tb}, {tc} are the same with the things counted.
_MORE = (
    "{hero} has {ta}. {hero2} gives {him} {b} more. Now {hero} has {tc}.",
    "{hero} has {ta} and {hero2} has {tb}. Together they have {tc}.",
    "There are {ta} in the basket. {hero} puts {b} more into it. Now there are {tc} in the basket.",
    "In the morning {hero} finds {ta}. In the evening {he} finds {b} more. That makes {tc}.",
    "{hero} has {ta}. {He} buys {b} more at the market. How many does {he} have now? {He} has {tc}.",
    "{hero} counted {ta} on one table and {tb} on the other. How many are there in all? There are {tc} in all.",
)
_LESS = (
    "{hero} has {tc}. {He} gives {b} of them to {hero2}. Now {hero} has {ta}.",
    "There were {tc} in the box. {hero} took {b} of them out. Now there are {ta} left.",
    "{hero} had {tc}, but {he} lost {b} of them on the way. {He} has {ta} left.",
    "{hero} wants to have {tc}. {He} already has {ta}. How many are missing? {^b} are missing.",
    "{hero} has {tc} and {hero2} has {ta}. How many more does {hero} have? {hero} has {b} more.",
)


def _amount(n: int, noun: tuple[str, str], words: bool) -> str:
    return f"{number_word(n) if words else n} {noun[0] if n == 1 else noun[1]}"


def word_problems(world: World, draw: Draw) -> str:
    """Two to four word problems about people and their things, in words or in digits."""
    out = []
    for _ in range(draw.between(2, 4)):
        person, noun, words = draw.pick(world.people), draw.pick(COUNTABLE), draw.chance(0.5)
        while True:
            low = draw.addends(2, 9, 11, 40) if draw.split == VAL else draw.addends(2, 9, 2, 12)
            big = draw.addends(2, 60)
            a, b = big if draw.chance(0.4) else low if draw.chance(0.5) else low[::-1]
            if a != b:
                break
        c = a + b
        fields = pair_fields(world, person.name) | {
            "a": number_word(a) if words else str(a), "b": number_word(b) if words else str(b),
            "ta": _amount(a, noun, words), "tb": _amount(b, noun, words), "tc": _amount(c, noun, words),
        }  # fmt: skip
        out.append(capital(fill(draw.pick(_MORE if draw.chance(0.5) else _LESS), draw, fields)))
    return "\n".join(out)
