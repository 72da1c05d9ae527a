"""Text with numbers in it: sums, equations, word problems, counting, comparing.

Every sum that is written down, in digits, in words or inside a story, asks `Draw.addends` for its numbers, so a number
family of the held-out side (see `chance.sum_side`) is met nowhere in training text.
"""

from __future__ import annotations

from nanochat_jax.demo_world.draw import TRAIN, Draw, side
from nanochat_jax.demo_world.number_words import number_word
from nanochat_jax.demo_world.template import capital, fill
from nanochat_jax.demo_world.world import World


def _pair(draw: Draw) -> tuple[int, int]:
    """Two numbers to add: mostly small, sometimes with three digits."""
    kind = draw.below(20)
    if kind < 7:
        return draw.addends(0, 20)
    if kind < 17:
        return draw.addends(2, 99)
    return draw.addends(100, 499, 10, 499)


_DIGIT_LINES = ("{a} + {b} = {c}", "{b} + {a} = {c}", "{c} - {a} = {b}", "{c} - {b} = {a}")
_WORD_LINES = (
    "{^wa} plus {wb} is {wc}.", "{^wb} plus {wa} is {wc}.", "{^wc} minus {wa} is {wb}.", "{^wc} minus {wb} is {wa}.",
    "The sum of {wa} and {wb} is {wc}.", "Take {wa} away from {wc} and {wb} is left.",
    "If you add {wa} and {wb}, you get {wc}.",
)  # fmt: skip
_QUESTION_LINES = (
    "What is {a} + {b}? {a} + {b} is {c}.", "What is {c} - {a}? {c} - {a} is {b}.",
    "How much is {a} plus {b}? It is {c}.",
    "How much is {c} minus {b}? It is {a}.", "Add {a} and {b}. The answer is {c}.",
    "Subtract {a} from {c}. The answer is {b}.",
)  # fmt: skip


def _sum_fields(a: int, b: int) -> dict[str, str]:
    c = a + b
    return {
        "a": str(a), "b": str(b), "c": str(c), "wa": number_word(a), "wb": number_word(b), "wc": number_word(c),
    }  # fmt: skip


def sums(world: World, draw: Draw) -> str:
    """A page of additions and subtractions, in digits, in words or as questions."""
    style = draw.below(4)
    lines = (_DIGIT_LINES, _WORD_LINES, _QUESTION_LINES, _DIGIT_LINES + _WORD_LINES + _QUESTION_LINES)[style]
    out = []
    for _ in range(draw.between(5, 12)):
        pair = _pair(draw)
        fields = _sum_fields(*pair)
        if style == 3 and draw.chance(0.4):  # the same sum twice, in digits and in words
            out.append(f"{fields['a']} + {fields['b']} = {fields['c']}")
            out.append(fill("{^wa} plus {wb} is {wc}.", draw, fields))
        else:
            out.append(fill(draw.pick(lines), draw, fields))
    if draw.chance(0.4):
        head = draw.pick(
            ("Here are some sums.", "Let us add and subtract.", "Sums for today:", "We practice our sums.")
        )
        out.insert(0, head)
    return "\n".join(out)


def row_of_sums(world: World, draw: Draw) -> str:
    """One number and its neighbors: "20 + 5 = 25", "21 + 5 = 26", ... leaving out what the other split owns."""
    _, b = draw.addends(11, 80, 1, 30)
    start = draw.between(1, 70)
    out = []
    for a in range(start, start + 12):
        if side("sum", *sorted((a, b))) == draw.split and max(a, b) > 10 or max(a, b) <= 10 and draw.split == TRAIN:
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
        words = f"{capital(number_word(a))} times {number_word(b)} is {number_word(a * b)}."
        out.append(draw.pick((f"{a} * {b} = {a * b}", words, f"What is {a} times {b}? {a} times {b} is {a * b}.")))
    return "\n".join(out)


def equations(world: World, draw: Draw) -> str:
    """Small equations with their solution: "If 5*x + 3 = 13, then x is 2."."""
    out: list[str] = []
    n = draw.between(3, 7)
    explain = draw.chance(0.3)
    while len(out) < n:
        a, x, b = draw.between(2, 6), draw.between(1, 10), draw.between(1, 12)
        if side("equation", a, x, b) != draw.split:
            continue
        if explain:
            out.append(
                f"Solve {a}*x + {b} = {a * x + b}. First we take away {b} on both sides, and {a}*x = {a * x} remains. "
                f"Then we divide by {a}, so x is {x}."
            )
        else:
            out.append(f"If {a}*x + {b} = {a * x + b}, then x is {x}.")
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
        out.append(
            draw.pick(
                (
                    f"{high} is more than {low}.",
                    f"{low} is less than {high}.",
                    f"Which is more, {a} or {b}? {high} is more.",
                    f"Which is less, {a} or {b}? {low} is less.",
                    f"Between {low} and {high}, the larger number is {high}.",
                )
            )
        )
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
    row = ", ".join(number_word(i) if words else str(i) for i in numbers)
    person = draw.pick(world.people)
    how = "" if step == 1 else f" in steps of {number_word(step)}"
    way = "down" if down else "up"
    first, last = (number_word(numbers[0]), number_word(numbers[-1])) if words else (str(numbers[0]), str(numbers[-1]))
    heads = (
        f"{person.name} counts {way}{how} from {first} to {last}: {row}.",
        f"Let us count {way}{how} from {first} to {last}. {capital(row)}.",
        f"Counting {way}{how}: {row}.",
        f'"Can you count {way} from {first} to {last}{how}?" asked {person.friend}. "Yes," said {person.name}. '
        f'"{capital(row)}."',
    )
    return draw.pick(heads)
