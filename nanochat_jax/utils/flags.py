"""Command-line flags from a dataclass: one field, one flag.

    @dataclass(frozen=True)
    class Settings:
        depth: int = flag(20, "the number of layers")
        prompt: str = flag("", "text to complete", short="p")

    settings = parse(Settings, sys.argv[1:], "what the script does")

Flags are written `--key=value` or `--key value`, with underscores or dashes; a bool also as a bare `--key`; a repeated
flag's last value wins. A mistake ends the process with status 2 and one line on how to put it right.
"""

import dataclasses
import difflib
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nanochat_jax.utils.errors import UserError

T = TypeVar("T")

_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
_KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "text", Path: "a path"}


def flag(
    default: Any, help: str, *, short: str = "", choices: Sequence[str] = (), words: Mapping[str, Any] | None = None
) -> Any:
    """A dataclass field that is a flag: its default, its line in --help, a one-letter form (-p), the values allowed,
    words that stand for values ({"auto": 0})."""
    meta = {"help": help, "short": short, "choices": tuple(choices), "words": dict(words or {})}
    return dataclasses.field(default=default, metadata=meta)


# Flags of the reference that have another name here. They are not taken, since their meaning may differ a little.
RENAMED = {
    "core_metric_every": "scripts.eval evaluates CORE after training (--tasks=CORE)",
    "core_metric_max_per_task": "scripts.eval evaluates CORE after training (--max_per_task)",
    "run": "--run_name here",
    "model_tag": "--run_name here, and --source for the run to start from",
    "device_type": "--device here (auto, cpu or gpu)",
    "eval_steps": "--eval_tokens here, in tokens",
    "target_examples_per_step": "--total_batch_size here, in tokens",
    "eval_metrics_every": "--metrics_every here",
    "eval_metrics_max_problems": "--metrics_max_problems here",
    "dry_run": "not needed here: nothing is logged elsewhere unless --sinks asks for it",
}


class _BadValue(Exception):
    """What a value should have been."""


@dataclasses.dataclass(frozen=True)
class _Flag:
    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    short: str
    choices: tuple[str, ...]
    words: dict[str, Any]

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
        try:
            value = _convert(self.kind, text)
        except (ValueError, InvalidOperation):
            raise _BadValue(self.expects()) from None
        if self.choices and value not in self.choices:
            raise _BadValue(self.expects())
        return value


def _convert(kind: type, text: str) -> Any:
    if kind is bool:
        lowered = text.lower()
        if lowered not in _TRUE | _FALSE:
            raise ValueError
        return lowered in _TRUE
    if kind is int:
        number = Decimal(text)  # exact, so 1e6 is the integer it says, while 1.5 is refused instead of cut
        if not number.is_finite() or number != number.to_integral_value():
            raise ValueError
        return int(number)
    if kind is float:
        value = float(text)
        if math.isnan(value):
            raise ValueError
        return value
    return kind(text)


def _flags_of(settings: type) -> dict[str, _Flag]:
    hints, flags = typing.get_type_hints(settings), {}
    for field in dataclasses.fields(settings):
        kind: Any = hints[field.name]
        optional = False
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kinds = [k for k in typing.get_args(kind) if k is not type(None)]
            optional, kind = len(kinds) < len(typing.get_args(kind)), kinds[0] if len(kinds) == 1 else None
        if kind not in _KINDS:
            raise TypeError(
                f"{settings.__name__}.{field.name}: flags are int, float, bool, str or Path, or one of them | None"
            )
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        meta = field.metadata
        extras = meta.get("help", ""), meta.get("short", ""), meta.get("choices", ()), meta.get("words", {})
        flags[field.name] = _Flag(field.name, kind, optional, default, *extras)
    return flags


def parse(
    settings: type[T], argv: Sequence[str], description: str = "", *, echo: bool = True, unused: Sequence[str] = ()
) -> T:
    """An instance of the dataclass `settings` from command-line arguments; --help prints and exits with status 0.

    echo: print the flags that differ from their defaults. unused: flags that are taken but do nothing in this command;
    --help only names them. Types come from the annotations: int, float, bool, str, Path, or one of these `| None`; an
    int accepts 1e6, a float accepts 1. Exits with status 2 and a line on stderr for an unknown flag (naming the
    nearest), a value of another type, a missing value, a positional argument, and for what `settings` itself refuses
    with a UserError.
    """
    flags = _flags_of(settings)
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(_help(flags, description, unused))
            raise SystemExit(0)
        spec, value = _lookup(flags, argument)
        if value is None and rest and _is_value(spec, rest[0]):
            value = rest.pop(0)
        if value is None and spec.kind is bool:
            value = "True"
        if value is None:
            fail(f"--{spec.name} needs a value: --{spec.name}={_hint(spec)}")
        try:
            values[spec.name] = spec.convert(value)
        except _BadValue as expected:
            fail(f"--{spec.name} expects {expected}, got {value!r}")
    missing = [name for name, spec in flags.items() if spec.default is dataclasses.MISSING and name not in values]
    if missing:
        fail(f"--{missing[0]} is required: --{missing[0]}={_hint(flags[missing[0]])}")
    try:
        result = settings(**values)
    except UserError as error:
        fail(str(error))
    if echo:
        for name, value in values.items():
            if value != flags[name].default:
                spec = flags[name]
                default = "" if spec.default is dataclasses.MISSING else f" (default {spec.shown(spec.default)})"
                print(f"--{name} = {spec.shown(value)}{default}")
    return result


def is_set(name: str, argv: Sequence[str]) -> bool:
    """Whether a bool flag is given as true, before the rest is parsed. The last one counts; nonsense is false."""
    found = False
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        key, equals, value = argument.partition("=")
        if argument.startswith("--") and _normal(key) == name:
            value = value if equals else (following if following.lower() in _TRUE | _FALSE else "true")
            found = value.lower() in _TRUE
    return found


def _normal(key: str) -> str:
    return key.removeprefix("--").replace("-", "_")


def _lookup(flags: dict[str, _Flag], argument: str) -> tuple[_Flag, str | None]:
    key, equals, value = argument.partition("=")
    if argument.startswith("--") and len(key) > 2:
        if _normal(key) in flags:
            return flags[_normal(key)], value if equals else None
        if instead := _renamed(key, flags):
            fail(f"unknown flag {key}: {instead} (--help lists all)")
        nearest = difflib.get_close_matches(_normal(key), flags, n=1, cutoff=0.0)
        fail(f"unknown flag {key}" + (f"; did you mean --{nearest[0]}?" if nearest else "") + " (--help lists all)")
    for spec in flags.values():
        if spec.short and key == f"-{spec.short}":
            return spec, value if equals else None
    fail(f"unexpected argument {argument!r}: settings are given as --key=value (--help lists them)")


def _renamed(key: str, flags: Mapping[str, Any]) -> str:
    """What to write instead of a flag of the reference; "" where this command has nothing of the kind."""
    instead = RENAMED.get(_normal(key), "")
    if instead.startswith("scripts"):
        return instead
    return f"it is {instead}" if set(re.findall(r"--(\w+)", instead)) & set(flags) else ""


def _is_value(spec: _Flag, text: str) -> bool:
    """Whether the next argument belongs to the flag before it. A bare bool takes it only if it is a truth value."""
    return text.lower() in _TRUE | _FALSE if spec.kind is bool else not text.startswith("--")


def _hint(spec: _Flag) -> str:
    return "|".join(spec.choices or [spec.kind.__name__.upper(), *spec.words])


def fail(message: str) -> NoReturn:
    """Ends the process as every mistake on the command line does: one line on stderr, status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _help(flags: dict[str, _Flag], description: str, unused: Sequence[str]) -> str:
    lines = [*_paragraphs(description), ""] if description.strip() else []
    for spec in (spec for name, spec in flags.items() if name not in unused):
        short = f"-{spec.short}, " if spec.short else ""
        lines.append(f"  {short}--{spec.name}={_hint(spec)}")
        default = "required" if spec.default is dataclasses.MISSING else f"default {spec.shown(spec.default)}"
        lines += textwrap.wrap(f"{spec.help} ({default})" if spec.help else f"({default})", 92, **_INDENT)
    if unused:
        names = ", ".join(f"--{name}" for name in unused)
        lines += ["", *textwrap.wrap(f"Taken, since other commands share them, but not used here: {names}", 100)]
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
