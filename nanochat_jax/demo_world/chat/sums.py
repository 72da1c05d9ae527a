"""Sums and differences of numbers up to three digits, worked out by the calculator.

The numbers come from `Draw.addends`: a number family of the held-out side is met in no training conversation, and in
no training document either.
"""

from __future__ import annotations

from nanochat_jax.demo_world.chat.talk import Conversation, calculated, conversation, opened, said
from nanochat_jax.demo_world.draw import VAL, Draw
from nanochat_jax.demo_world.world import World

_PLUS = (
    "What is {0} + {1}?", "What is {0} plus {1}?", "How much is {0} + {1}?", "How much is {0} plus {1}?", "{0}+{1}",
    "{0} + {1}",
    "{0}+{1}=?", "{0} + {1} = ?", "Add {0} and {1}.", "Calculate {0} + {1}.", "Please add {0} and {1}.",
    "What is the sum of {0} and {1}?", "Can you add {0} and {1}?", "What do you get if you add {0} and {1}?",
    "Work out {0} plus {1}.", "What's {0}+{1}?",
)  # fmt: skip
_MINUS = (
    "What is {0} - {1}?", "What is {0} minus {1}?", "How much is {0} - {1}?", "How much is {0} minus {1}?", "{0}-{1}",
    "{0} - {1}",
    "{0}-{1}=?", "{0} - {1} = ?", "Take {1} away from {0}.", "Calculate {0} - {1}.", "Subtract {1} from {0}.",
    "What is the difference of {0} and {1}?", "Can you subtract {1} from {0}?", "Work out {0} minus {1}.",
    "What's {0}-{1}?",
)  # fmt: skip


def _family(draw: Draw) -> tuple[int, int]:
    """Two numbers to add. Training also has the small ones; what is held out has two or three digits."""
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
    a, b = _family(draw)
    first, second, sign, forms = (a, b, "+", _PLUS) if draw.chance(0.5) else (a + b, a, "-", _MINUS)
    answer = calculated(f"{first}{sign}{second}")
    answer += said(f"{first} {sign} {second} is {answer[-1]['text']}.")
    return conversation(opened(draw.pick(forms).format(first, second), draw), answer)
