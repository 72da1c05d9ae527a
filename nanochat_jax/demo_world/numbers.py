"""Text with numbers in it: sums, equations, word problems, counting, comparing.

Every sum that is written down, in digits, in words or inside a story, asks `Draw.addends` for its numbers, so a number
family of the held-out side (see `draw.sum_side`) is met nowhere in training text.
"""

from __future__ import annotations

from nanochat_jax.demo_world.draw import TRAIN, VAL, Draw, side, sum_side
from nanochat_jax.demo_world.lexicon import COUNTABLE, number_word
from nanochat_jax.demo_world.people import pair_fields
from nanochat_jax.demo_world.tables import read_table
from nanochat_jax.demo_world.template import capital, fill
from nanochat_jax.demo_world.world import World

_PHRASES = read_table("documents")


def _pair(draw: Draw) -> tuple[int, int]:
    """Two numbers to add: mostly small, sometimes with three digits."""
    kind = draw.below(20)
    if kind < 7:
        return draw.addends(0, 20)
    if kind < 17:
        return draw.addends(2, 99)
    return draw.addends(100, 499, 10, 499)


def _digits_and_words(**numbers: int) -> dict[str, str]:
    """Every number in digits and, with a w before its name, in words."""
    return {k: str(n) for k, n in numbers.items()} | {"w" + k: number_word(n) for k, n in numbers.items()}


def sums(world: World, draw: Draw) -> str:
    """A page of additions and subtractions, in digits, in words or as questions."""
    phrases, style = _PHRASES["sums"], draw.below(4)
    digits, words, questions = phrases["digits"], phrases["words"], phrases["questions"]
    lines = (digits, words, questions, digits + words + questions)[style]
    out = []
    for _ in range(draw.between(5, 12)):
        a, b = _pair(draw)
        fields = _digits_and_words(a=a, b=b, c=a + b)
        if style == 3 and draw.chance(0.4):  # the same sum twice, in digits and in words
            out += [fill(digits[0], draw, fields), fill(words[0], draw, fields)]
        else:
            out.append(fill(draw.pick(lines), draw, fields))
    if draw.chance(0.4):
        out.insert(0, draw.pick(phrases["begin"]))
    return "\n".join(out)


def row_of_sums(world: World, draw: Draw) -> str:
    """One number and its neighbors: "20 + 5 = 25", "21 + 5 = 26", ... leaving out what the other split owns."""
    _, b = draw.addends(11, 80, 1, 30)
    start = draw.between(1, 70)
    out = []
    for a in range(start, start + 12):
        if sum_side(a, b) == draw.split:
            out.append(f"{a} + {b} = {a + b}")
    if len(out) < 3:  # the held-out side owns one family in ten: a whole row of them is rare, a page of sums is not
        return sums(world, draw)
    return "\n".join(out)


def products(world: World, draw: Draw) -> str:
    """Multiplication by two to twelve; families above ten belong to one split, those below to training."""
    out: list[str] = []
    n = draw.between(4, 9)
    while len(out) < n:
        a, b = draw.between(2, 12), draw.between(2, 12 if draw.chance(0.5) else 40)
        low, high = min(a, b), max(a, b)
        if (TRAIN if high <= 10 else side("product", low, high)) != draw.split:
            continue
        out.append(fill(draw.pick(_PHRASES["products"]["lines"]), draw, _digits_and_words(a=a, b=b, c=a * b)))
    return "\n".join(out)


def equations(world: World, draw: Draw) -> str:
    """Small equations with their solution: "If 5*x + 3 = 13, then x is 2."."""
    out: list[str] = []
    n = draw.between(3, 7)
    phrase = _PHRASES["equations"]["explained" if draw.chance(0.3) else "short"]
    while len(out) < n:
        a, x, b = draw.between(2, 6), draw.between(1, 10), draw.between(1, 12)
        if side("equation", a, x, b) != draw.split:
            continue
        out.append(fill(phrase, draw, _digits_and_words(a=a, b=b, x=x, ax=a * x, c=a * x + b)))
    return "\n".join(out)


def comparing(world: World, draw: Draw) -> str:
    """Which of two numbers is larger, and which numbers come just before and after."""
    out: list[str] = []
    n = draw.between(4, 8)
    while len(out) < n:
        a, b = draw.between(1, 150), draw.between(1, 150)
        if a == b or side("compare", *sorted((a, b))) != draw.split:
            continue
        low, high = min(a, b), max(a, b)
        fields = _digits_and_words(a=a, b=b, low=low, high=high)
        out.append(fill(draw.pick(_PHRASES["comparing"]["lines"]), draw, fields))
    return "\n".join(out)


def counting(world: World, draw: Draw) -> str:
    """Counting up or down, in steps, in words or in digits."""
    while True:
        step, start, n = draw.pick((1, 1, 1, 2, 2, 5, 10, 3)), draw.between(1, 60), draw.between(6, 12)
        words, down = draw.chance(0.5), draw.chance(0.3)
        if side("count", step, words, down, start, n) == draw.split:
            break
    numbers = [start + step * i for i in range(n)]
    if down:
        numbers.reverse()
    said = [number_word(i) if words else str(i) for i in numbers]
    person = draw.pick(world.people)
    fields = {
        "person": person.name, "friend": person.friend, "way": "down" if down else "up",
        "steps": "" if step == 1 else f" in steps of {number_word(step)}",
        "first": said[0], "last": said[-1], "row": ", ".join(said),
    }  # fmt: skip
    return fill(draw.pick(_PHRASES["counting"]["lines"]), draw, fields)


def _amount(n: int, noun: tuple[str, str], words: bool) -> str:
    return f"{number_word(n) if words else n} {noun[0] if n == 1 else noun[1]}"


def word_problems(world: World, draw: Draw) -> str:
    """Two to four little stories in which something is given, found or counted, in words or in digits."""
    phrases, out = _PHRASES["word_problems"], []
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
        out.append(capital(fill(draw.pick(phrases["more" if draw.chance(0.5) else "less"]), draw, fields)))
    return "\n".join(out)
