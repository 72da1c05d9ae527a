"""Command-line flags from a dataclass: one field, one flag.

    @dataclass(frozen=True)
    class Settings:
        depth: int = flag(20, "the number of layers")
        prompt: str = flag("", "text to complete", short="p")

    settings = parse(Settings, sys.argv[1:], "what the script does")

Flags are written `--key=value` or `--key value`, with underscores or dashes; a bool also as a bare `--key`; a repeated
flag's last value wins. A mistake ends the process with status 2 and one line that names the remedy.

Other defaults, as for `--demo`, are another instance: `parse(dataclasses.replace(Settings(), depth=4), argv)`.
"""

import dataclasses
import difflib
import math
import os
import re
import shlex
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nanochat_jax.utils.errors import UserError

T = TypeVar("T")

_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
_KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "text", Path: "a path"}


def flag(
    default: Any,
    help: str,
    *,
    short: str = "",
    choices: Sequence[str] = (),
    words: Mapping[str, Any] | None = None,
    free: bool = False,
    decides: str = "",
    unused_by: Sequence[str] = (),
    reference: Mapping[str, str] | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field that is a flag, with everything that is known of it.

    Arguments:
        help: its line in --help.
        short: a one-letter form ("p" for -p).
        choices: the values allowed.
        words: words that stand for values ({"auto": 0}).
        free: the flag may change when a run is resumed: it alters neither the numbers nor the order of the data.
        decides: what a run records and compares in place of the flag ("num_iterations", "rows", "parent").
        unused_by: stages that accept the flag, since scripts pass the same flags to all of them, and ignore it.
        reference: nanochat's flags that this one replaces, {name: what to write instead}. They are not accepted, since
            their meaning may differ a little.
        path: a text flag whose value is a path. The shell expands no ~ behind a "=", so it is done here, as for a Path.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "short": short,
            "choices": tuple(choices),
            "words": dict(words or {}),
            "free": free,
            "decides": decides,
            "unused_by": tuple(unused_by),
            "reference": dict(reference or {}),
            "path": path,
        },
    )


class _BadValue(Exception):
    """What a value should have been."""


@dataclasses.dataclass(frozen=True)
class _Flag:
    name: str
    kind: type
    optional: bool
    default: Any
    group: str  # the heading in --help: the first line of the docstring of the class that declares it
    help: str = ""
    short: str = ""
    choices: tuple[str, ...] = ()
    words: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    free: bool = False
    decides: str = ""
    unused_by: tuple[str, ...] = ()
    reference: Mapping[str, str] = dataclasses.field(default_factory=dict)
    path: bool = False

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    def hint(self) -> str:
        """How its value is written: INT, none|mlp|block."""
        return "|".join(self.choices or [self.kind.__name__.upper(), *self.words])

    def expects(self) -> str:
        what = f"one of {', '.join(self.choices)}" if self.choices else _KINDS[self.kind]
        return " or ".join([what, *self.words, *(["None"] if self.optional else [])])

    def shown(self, value: Any) -> str:
        """A value as one would write it."""
        return next((word for word, v in self.words.items() if v == value), repr(value))

    def convert(self, text: str) -> Any:
        if self.optional and text.lower() == "none":
            return None
        if text.lower() in self.words:
            return self.words[text.lower()]
        if self.path or self.kind is Path:
            text = os.path.expanduser(text)
        try:
            value = _convert(self.kind, text)
        except (ValueError, InvalidOperation):
            raise _BadValue(self.expects()) from None
        if self.choices and value not in self.choices:
            raise _BadValue(self.expects())
        return value

    def takes(self, text: str) -> bool:
        """Whether the next argument belongs to this flag. A bare bool takes it only if it is a truth value."""
        return text.lower() in _TRUE | _FALSE if self.kind is bool else not text.startswith("--")


def _convert(kind: type, text: str) -> Any:
    if kind is bool:
        lowered = text.lower()
        if lowered not in _TRUE | _FALSE:
            raise ValueError
        return lowered in _TRUE
    if kind is int:
        number = Decimal(text)  # exact, so 1e6 is the integer it says, while 1.5 is refused instead of rounded
        if not number.is_finite() or number != number.to_integral_value():
            raise ValueError
        return int(number)
    if kind is float:
        value = float(text)
        if math.isnan(value):
            raise ValueError
        return value
    return kind(text)


def _flags_of(settings: Any) -> dict[str, _Flag]:
    """The flags of a dataclass, or of an instance, whose values are then the defaults."""
    cls = settings if isinstance(settings, type) else type(settings)
    hints, flags = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        kind: Any = hints[field.name]
        optional = False
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kinds = [k for k in typing.get_args(kind) if k is not type(None)]
            optional, kind = len(kinds) < len(typing.get_args(kind)), kinds[0] if len(kinds) == 1 else None
        if kind not in _KINDS:
            raise TypeError(
                f"{cls.__name__}.{field.name}: flags are int, float, bool, str or Path, or one of them | None"
            )
        default = field.default if settings is cls else getattr(settings, field.name)
        group = next(c for c in reversed(cls.__mro__) if field.name in c.__dict__.get("__annotations__", {}))
        heading = (group.__doc__ or "").partition("\n")[0]
        flags[field.name] = _Flag(field.name, kind, optional, default, heading, **field.metadata)
    return flags


def parse(
    settings: type[T] | T, argv: Sequence[str], description: str = "", *, echo: bool = True, stage: str = ""
) -> T:
    """Settings from command-line arguments; --help prints and exits with status 0.

    Arguments:
        settings: the dataclass, or an instance of it, whose values are then the defaults. Types come from the
            annotations: int, float, bool, str, Path, or one of these `| None`; an int accepts 1e6, a float accepts 1.
        description: what --help begins with.
        echo: print the flags that differ from their defaults.
        stage: whose flags these are; what is marked as unused by it is listed apart in --help, and named when given.

    Exits with status 2 and one line on stderr for an unknown flag (naming the nearest), a value of another type, a
    missing value, a positional argument, and for what the dataclass itself refuses with a UserError.
    """
    flags = _flags_of(settings)
    if any(argument in ("-h", "--help") for argument in argv):
        print(_help(flags, description, stage))
        raise SystemExit(0)
    values = dict(_values(flags, argv))
    for spec in flags.values():
        if spec.required and spec.name not in values:
            fail(f"--{spec.name} is required: --{spec.name}={spec.hint()}")
    cls: Any = settings if isinstance(settings, type) else type(settings)
    defaults = {spec.name: spec.default for spec in flags.values() if not spec.required}
    try:
        result = cls(**{**defaults, **values})
    except UserError as error:
        fail(str(error))
    changed = [flags[name] for name, value in values.items() if value != flags[name].default]
    if echo:
        for spec in changed:
            default = "" if spec.required else f" (default {spec.shown(spec.default)})"
            print(f"--{spec.name} = {spec.shown(values[spec.name])}{default}")
        if unused := [f"--{spec.name}" for spec in changed if stage in spec.unused_by]:
            print(f"not used by {stage}: {', '.join(unused)}")
    return result


def _values(flags: dict[str, _Flag], argv: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(name, value) of every flag on the command line, in order."""
    rest = list(argv)
    while rest:
        key = rest[0]
        spec, value = _lookup(flags, rest.pop(0))
        if value is None and rest and spec.takes(rest[0]):
            value = rest.pop(0)
        if value is None and spec.kind is bool:
            value = "True"
        if value is None:
            meant = f"; a value that begins with -- is written {key}={shlex.quote(rest[0])}" if rest else ""
            fail(f"--{spec.name} needs a value: --{spec.name}={spec.hint()}{meant}")
        try:
            yield spec.name, spec.convert(value)
        except _BadValue as expected:
            fail(f"--{spec.name} expects {expected}, got {value!r}")


def is_set(name: str, argv: Sequence[str]) -> bool:
    """Whether a bool flag is given as true, before the rest is parsed. The last one counts; nonsense is false."""
    found = False
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        key, equals, value = argument.partition("=")
        if argument.startswith("--") and _normal(key) == name:
            value = value if equals else (following if following.lower() in _TRUE | _FALSE else "true")
            found = value.lower() in _TRUE
    return found


def chosen(name: str, argv: Sequence[str]) -> str | None:
    """The value given to a flag, before the rest is parsed. The last one counts; None: it is not given."""
    found = None
    for argument, following in zip(argv, [*argv[1:], None], strict=False):
        key, equals, value = argument.partition("=")
        if argument.startswith("--") and _normal(key) == name:
            found = value if equals else following
    return found


def _normal(key: str) -> str:
    return key.removeprefix("--").replace("-", "_")


def _lookup(flags: dict[str, _Flag], argument: str) -> tuple[_Flag, str | None]:
    """The flag that an argument names, and the value behind its "="."""
    key, equals, value = argument.partition("=")
    name = _normal(key)
    if argument.startswith("--") and len(key) > 2:
        if name in flags:
            return flags[name], value if equals else None
        if instead := next((spec.reference[name] for spec in flags.values() if name in spec.reference), ""):
            fail(f"unknown flag {key}: {instead} (--help lists all)")
        nearest = difflib.get_close_matches(name, flags, n=1, cutoff=0.0)
        fail(f"unknown flag {key}" + (f"; did you mean --{nearest[0]}?" if nearest else "") + " (--help lists all)")
    for spec in flags.values():
        if spec.short and key == f"-{spec.short}":
            return spec, value if equals else None
    fail(f"unexpected argument {argument!r}: settings are given as --key=value (--help lists them)")


def fail(message: str) -> NoReturn:
    """Ends the process as every mistake on the command line does: one line on stderr, status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# --help


def _help(flags: dict[str, _Flag], description: str, stage: str) -> str:
    """All flags, in groups by the class that declares them, the most special ones first."""
    lines = [*_paragraphs(description), ""] if description.strip() else []
    used = [spec for spec in flags.values() if stage not in spec.unused_by]
    groups = list(dict.fromkeys(spec.group for spec in used))
    for group in reversed(groups):
        if len(groups) > 1:
            lines += ["", group, ""] if lines and lines[-1] else [group, ""]
        for spec in (spec for spec in used if spec.group == group):
            short = f"-{spec.short}, " if spec.short else ""
            lines.append(f"  {short}--{spec.name}={spec.hint()}")
            default = "required" if spec.required else f"default {spec.shown(spec.default)}"
            lines += textwrap.wrap(f"{spec.help} ({default})".strip(), 92, **_INDENT)
    if unused := [f"--{spec.name}" for spec in flags.values() if stage in spec.unused_by]:
        named = f"Accepted, since other stages share them, but not used here: {', '.join(unused)}"
        lines += ["", *textwrap.wrap(named, 100)]
    return "\n".join(lines)


def _paragraphs(text: str) -> list[str]:
    """Lines of a module's docstring for a terminal: paragraphs wrapped anew, but as they are written where lines are
    indented or set in columns (commands with their explanations)."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        written = block.splitlines()
        as_it_is = any(line.startswith(" ") or "   " in line for line in written)
        lines += ["", *(written if as_it_is else textwrap.wrap(block, 100))]
    return lines[1:]


_INDENT: dict[str, Any] = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}
