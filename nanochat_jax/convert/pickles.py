"""Reading pickles without executing them.

A pickle is a program that may call anything importable. This reader runs a small part of that language itself: plain
containers, numbers, strings, and the few names its caller lists, each standing for a harmless constructor of our own.
Nothing is imported and nothing of the file is called; every other name or instruction is refused by name.
"""

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanochat_jax.convert import InterchangeError

MAX_BYTES = 256 << 20  # of a pickle stream; tensors lie outside it, a tokenizer of 200,000 tokens takes 4 MB


@dataclass(frozen=True)
class Name:
    """A name that the caller admits. `build(*arguments)` replaces the call; None: the name itself is the value."""

    module: str
    name: str
    build: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class State:
    """An object of an admitted class and the state that the pickle gives it."""

    def __init__(self, name: Name):
        self.name, self.state = name, None


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_IGNORED = {"PROTO", "FRAME"}


def read(
    data: bytes,
    names: Mapping[str, Callable[..., Any] | None],
    what: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value that a pickle describes.

    names: "module.name" -> constructor of our own, called with the arguments that the pickle gives (None: a bare name,
    kept as `Name`, or a class whose instance becomes a `State`). persistent: what an external reference stands for.
    Raises InterchangeError, naming `what`, for anything else and for damaged streams.
    """
    if len(data) > MAX_BYTES:
        raise InterchangeError(
            f"{what} holds a pickle of {len(data):,} bytes; the largest that is read is {MAX_BYTES:,}"
        )
    try:
        return _Reader(names, what, persistent).run(data)
    except InterchangeError:
        raise
    # a stream that is damaged or made to harm ends in one of these, here or in the standard library's parser
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, UnicodeError) as error:
        raise InterchangeError(f"{what} is damaged or no pickle ({type(error).__name__}: {error})") from error


class _Reader:
    def __init__(self, names, what: str, persistent):
        self.names, self.what, self.persistent = names, what, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                if len(self.stack) != 1 or self.stack[0] is _MARK:
                    raise ValueError("more or less than one value at the end")
                return self.stack[0]
            self.step(opcode.name, argument, position)
        raise ValueError("no end")

    def step(self, op: str, argument: Any, position: int | None) -> None:
        stack = self.stack
        if op in _LITERALS:
            stack.append(argument)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op == "MARK":
            stack.append(_MARK)
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top()
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self.pop_many(int(op[-1]))))
        elif op in ("TUPLE", "LIST", "FROZENSET"):
            stack.append({"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}[op](self.pop_to_mark()))
        elif op == "DICT":
            stack.append(_pairs(self.pop_to_mark()))
        elif op == "APPEND":
            value = self.pop()
            self.container(list).append(value)
        elif op == "APPENDS":
            values = self.pop_to_mark()
            self.container(list).extend(values)
        elif op == "SETITEM":
            key, value = self.pop_many(2)
            self.container(dict)[key] = value
        elif op == "SETITEMS":
            items = _pairs(self.pop_to_mark())
            self.container(dict).update(items)
        elif op == "ADDITEMS":
            values = self.pop_to_mark()
            self.container(set).update(values)
        elif op == "POP":
            self.pop()
        elif op == "GLOBAL":
            stack.append(self.admitted(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            stack.append(self.admitted(*self.pop_many(2)))
        elif op in ("REDUCE", "NEWOBJ"):
            name, arguments = self.pop_many(2)
            stack.append(self.call(name, arguments))
        elif op == "BUILD":
            state = self.pop()
            target = self.top()
            if isinstance(target, State):
                target.state = state
            elif not isinstance(target, dict):  # an OrderedDict's attributes (a state dict's versions) say nothing
                raise InterchangeError(
                    f"{self.what} gives a state to a {type(target).__name__}: refused, nothing was run"
                )
        elif op == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(self.pop()))
        elif op not in _IGNORED:
            raise InterchangeError(
                f"{self.what} uses the pickle instruction {op} at byte {position}: refused, nothing was run"
            )

    def admitted(self, module: Any, name: Any) -> Name:
        known = f"{module}.{name}"
        if known not in self.names:
            raise InterchangeError(
                f"{self.what} asks for {known!r}, which is no tensor or plain container: refused, nothing was run. If "
                "you trust the file, save only its tensors again where it was made"
            )
        return Name(module, name, self.names[known])

    def call(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise InterchangeError(f"{self.what} calls a {type(name).__name__}: refused, nothing was run")
        if name.build is None:
            return State(name)
        return name.build(*arguments)

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise IndexError("nothing on the stack")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def pop_many(self, n: int) -> list[Any]:
        return [self.pop() for _ in range(n)][::-1]

    def pop_to_mark(self) -> list[Any]:
        values = []
        while self.stack[-1] is not _MARK:
            values.append(self.stack.pop())
        self.stack.pop()
        return values[::-1]

    def container(self, kind: type) -> Any:
        if not isinstance(self.top(), kind):
            raise TypeError(f"a {kind.__name__} is needed, there is a {type(self.top()).__name__}")
        return self.stack[-1]


def _pairs(flat: list[Any]) -> dict:
    if len(flat) % 2:
        raise ValueError("a dict with a key but no value")
    return dict(zip(flat[::2], flat[1::2], strict=True))


class Writer:
    """Writes a pickle (protocol 2), instruction by instruction: the few that tensors and tokenizers need."""

    def __init__(self):
        self._out = bytearray(b"\x80\x02")

    def _put(self, data: bytes) -> "Writer":
        self._out += data
        return self

    def name(self, module: str, name: str) -> "Writer":
        """A class or function by its name."""
        return self._put(f"c{module}\n{name}\n".encode())

    def text(self, value: str) -> "Writer":
        data = value.encode("utf-8")
        return self._put(b"X" + struct.pack("<I", len(data)) + data)

    def raw(self, value: bytes) -> "Writer":
        return self._put(b"B" + struct.pack("<I", len(value)) + value)

    def integer(self, value: int) -> "Writer":
        """An integer from 0 to 2**63 - 1."""
        if value < 1 << 31:
            return self._put(b"J" + struct.pack("<i", value))
        return self._put(b"\x8a\x08" + struct.pack("<q", value))

    def false(self) -> "Writer":
        return self._put(b"\x89")

    def mark(self) -> "Writer":
        """Begins the items of `tuple` or `set_items`."""
        return self._put(b"(")

    def tuple(self) -> "Writer":
        return self._put(b"t")

    def dict(self) -> "Writer":
        """An empty dict, to be followed by `mark`, keys and values, `set_items`."""
        return self._put(b"}")

    def set_items(self) -> "Writer":
        return self._put(b"u")

    def reduce(self) -> "Writer":
        """Calls the name below the tuple with it."""
        return self._put(b"R")

    def new(self) -> "Writer":
        """An instance of the class below the tuple."""
        return self._put(b"\x81")

    def build(self) -> "Writer":
        """Gives the instance the state above it."""
        return self._put(b"b")

    def persistent_id(self) -> "Writer":
        return self._put(b"Q")

    def done(self) -> bytes:
        return bytes(self._out + b".")
