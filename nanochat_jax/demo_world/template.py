"""A tiny notation for sentences with alternatives.

    [One|Early one] morning {hero} found {a thing}.[| {He} was [very|so] glad.]

`[x|y]` is a choice (it may be empty and may be nested), `{name}` a field, `{^name}` the field with a capital letter,
`{a name}` and `{A name}` the field behind its article ("an apple"). A run of white space, line ends included, is one
space; the sign ¶ is a line end. A template is parsed once and rendered often, which is what makes the generator fast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Union

from nanochat_jax.demo_world.draw import Draw

# A parsed template: text, a field, or a choice between sequences of parts.
Part = Union[str, "Field", tuple]
_TOKEN = re.compile(r"\[|\]|\||\{[^{}]*\}|[^\[\]|{}]+")


@cache
def article(noun: str) -> str:
    """`noun` behind "a" or "an", by sound for the words of this world: "an hour", "a unicorn", "an apple"."""
    lower = noun.lower()
    if lower.startswith(("uni", "use", "one", "eu")):
        return "a " + noun
    vowel = lower[0] in "aeiou" or lower.startswith(("hour", "honest"))
    return ("an " if vowel else "a ") + noun


def capital(text: str) -> str:
    """`text` with its first letter made a capital; the rest stays as it is."""
    return text[:1].upper() + text[1:]


class Field:
    """A place for a value: its name and what to do with the value (nothing, "^", "a" or "A")."""

    __slots__ = ("mode", "name")

    def __init__(self, inside: str):
        if inside[:1] == "^":
            self.mode, self.name = "^", inside[1:]
        elif inside[:2] in ("a ", "A "):
            self.mode, self.name = inside[0], inside[2:]
        else:
            self.mode, self.name = "", inside

    def value(self, fields: Mapping[str, str]) -> str:
        text = fields[self.name]
        if not self.mode:
            return text
        if self.mode == "^":
            return capital(text)
        text = article(text)
        return capital(text) if self.mode == "A" else text


class Template:
    """A parsed template. Raises ValueError at once, with the text, when brackets do not match."""

    __slots__ = ("_parts",)

    def __init__(self, text: str):
        flat = re.sub(r"\s*¶\s*", "\n", re.sub(r"\s+", " ", text.strip()))
        tokens = _TOKEN.findall(flat)
        if "".join(tokens) != flat:
            raise ValueError(f"stray brace in template: {text!r}")
        self._parts, end = _parse(tokens, 0)
        if end != len(tokens):
            raise ValueError(f"unmatched ] or | outside brackets in template: {text!r}")

    def render(self, draw: Draw, fields: Mapping[str, str]) -> str:
        """The template with every choice made by `draw` and every field filled in; KeyError for an unknown field."""
        out: list[str] = []
        _render(self._parts, draw, fields, out)
        text = "".join(out)
        while "  " in text:
            text = text.replace("  ", " ")
        return text.strip().replace(" \n", "\n").replace("\n ", "\n")

    def names(self) -> set[str]:
        """The names of all fields that the template may ask for."""
        return set(_names(self._parts))


def _parse(tokens: list[str], i: int) -> tuple[tuple[Part, ...], int]:
    parts: list[Part] = []
    while i < len(tokens) and tokens[i] not in ("]", "|"):
        if tokens[i] == "[":
            options = []
            while True:
                option, i = _parse(tokens, i + 1)
                options.append(option[0] if len(option) == 1 and isinstance(option[0], str) else option)
                if i >= len(tokens):
                    raise ValueError(f"[ without ] in template: {''.join(tokens)!r}")
                if tokens[i] == "]":
                    break
            parts.append(tuple(options))
        elif tokens[i][0] == "{":
            parts.append(Field(tokens[i][1:-1]))
        else:
            parts.append(tokens[i])
        i += 1
    return tuple(parts), i


def _render(parts: tuple, draw: Draw, fields: Mapping[str, str], out: list[str]) -> None:
    for part in parts:
        if isinstance(part, str):
            out.append(part)
        elif isinstance(part, Field):
            out.append(part.value(fields))
        else:
            option = draw.pick(part)
            if isinstance(option, str):
                out.append(option)
            else:
                _render(option, draw, fields, out)


def _names(parts: tuple):
    for part in parts:
        if isinstance(part, Field):
            yield part.name
        elif isinstance(part, tuple):
            yield from _names(part)


@cache
def template(text: str) -> Template:
    """The parsed form of `text`, parsed only once."""
    return Template(text)


def fill(text: str, draw: Draw, fields: Mapping[str, str]) -> str:
    """`text` rendered: a short form of `template(text).render(draw, fields)`."""
    return template(text).render(draw, fields)


def join_words(words: list[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b, and c"."""
    if len(words) < 3:
        return f" {last} ".join(words)
    return ", ".join(words[:-1]) + f", {last} " + words[-1]
