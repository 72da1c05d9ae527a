"""What a plot is, and the pieces of text that several plots share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nanochat_jax.demo_world.template import Template

SHARED = {
    "%DAY%": "[One [sunny|bright|windy|cool|warm|quiet] [morning|day|afternoon]|One day|Early one morning|One day after"
    " school|On a [bright|quiet|warm] [spring|summer|autumn] day|Last week]",
    "%INTRO%": "[{hero} lived in {town}[|, where the river {river} flows|, a town in {region}|, which is known for its"
    " {known}].|In {town} lived {a person} called {hero}.|There was once {a person} called {hero} who lived in"
    " {town}.]",
}


@dataclass(frozen=True)
class Plot:
    """A story line: its name, the slots that are filled by chance (keys of `tell.SLOTS`), and its text.

    (plot, hero, slots) is the combination that belongs to one split.
    """

    name: str
    slots: tuple[str, ...]
    text: str

    @cached_property
    def template(self) -> Template:
        text = self.text
        for mark, shared in SHARED.items():
            text = text.replace(mark, shared)
        return Template(text)
