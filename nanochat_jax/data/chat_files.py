"""The user's own conversations: one file in any of the common shapes, read line by line.

Accepted (``.jsonl``, ``.json``, and either with ``.gz``), one conversation a line, or one JSON array of them:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
    {"prompt": "...", "completion": "..."}        also instruction (+ input) / output, question (+ context) / answer
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

What a value means, and which keys are obeyed or refused: ``data/chat_shapes.py``. Files may be larger than memory: only
the place and a hash of each conversation are kept, and a line is parsed again when it is asked for.
"""

import codecs
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from nanochat_jax.data.chat_shapes import SHAPES, to_conversation
from nanochat_jax.data.readers import decode_utf8
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import InputError
from nanochat_jax.utils.paths import data_dir

KEPT_PROBLEMS = 10_000
_SHOWN_TOKENS, _SHOWN_CHARS = 400, 400


# --- a file -----------------------------------------------------------------------------------------------------------


class ChatFile:
    """Conversations of a file, read on access: ``len(file)``, ``file[i]``, safe to share between threads.

    ``problems`` holds (line number, reason) of the lines left out (the first 10,000; all are counted in ``bad_lines``);
    in a file that is one JSON array the number is the item's. ``invalid_utf8`` counts the byte sequences replaced,
    ``ignored`` the conversations with a key that is not read, by its name.
    """

    def __init__(self, path: Path, lines: "_Lines", offsets: array, hashes: array):
        self.path, self._lines, self._offsets, self._hashes = path, lines, offsets, hashes
        self.problems: list[tuple[int, str]] = []
        self.bad_lines = self.invalid_utf8 = 0
        self.ignored: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Conversation ``index``. Raises ValueError naming the file when it was changed since it was opened."""
        if not 0 <= index < len(self._offsets):
            raise IndexError(f"conversation {index} of {len(self._offsets)}")
        conversation = None
        with contextlib.suppress(ValueError, RecursionError):
            conversation = to_conversation(_parsed(decode_utf8(self._lines.read(self._offsets[index]))[0]))
        if conversation is None or _hash(conversation) != self._hashes[index]:
            raise InputError(f"{self.path} was changed while it was in use; start again")
        return conversation

    def fingerprint(self) -> str:
        """Hash of all conversations in their order; the same text in another shape or file has the same."""
        return hashlib.sha256(self._hashes.tobytes()).hexdigest()

    def held_out(self, one_in: int = 20) -> tuple["ChatFile", "ChatFile"]:
        """(train, val): a conversation is held out if a hash of its content says so, about one in ``one_in``.

        The same conversation is on the same side wherever it stands, twice or in another file. If that holds nothing
        out, the conversation with the lowest hash is; with a single distinct conversation val is empty.
        """
        if one_in < 2:
            raise InputError(f"one_in is {one_in}; it must be 2 or more, or nothing is left to train on")
        held = {value for value in self._hashes if value % one_in == 0}
        distinct = set(self._hashes)
        if len(distinct) > 1 and not held:
            held = {min(distinct)}
        elif held == distinct:
            held = {min(distinct)} if len(distinct) > 1 else set()
        return self._some(lambda value: value not in held), self._some(lambda value: value in held)

    def _some(self, wanted: Callable[[int], bool]) -> "ChatFile":
        return self._chosen([i for i, value in enumerate(self._hashes) if wanted(value)])

    def shuffled(self, seed: int) -> "ChatFile":
        """The same conversations in an order that the seed decides, the same on every machine and in every version."""
        order = np.random.RandomState(seed & 0xFFFFFFFF).permutation(len(self))
        return self._chosen(order.tolist())

    def _chosen(self, chosen: list[int]) -> "ChatFile":
        offsets = array("q", (self._offsets[i] for i in chosen))
        return ChatFile(self.path, self._lines, offsets, array("Q", (self._hashes[i] for i in chosen)))


def load_chat_file(path: str | Path) -> ChatFile:
    """Opens a file of conversations (shapes: see the top of this module) and checks every line once.

    Raises ValueError naming the file when it is missing, empty, of another kind, or without any usable conversation.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; --data needs a file of conversations, such as my.jsonl")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    if (suffixes[:-1] if zipped else suffixes)[-1:] not in ([".jsonl"], [".json"], [".ndjson"]):
        raise InputError(f"{path}: cannot read this kind of file; conversations come as .jsonl, .json or .jsonl.gz")
    lines = _Lines(_unzipped(path) if zipped else open(path, "rb"))
    if b"\0" in lines.head:
        raise InputError(f"{path} is binary or UTF-16, not UTF-8 text; convert it")
    array_items = _whole_file(lines)
    if array_items is not None:
        lines = _Lines(_as_lines(array_items))
        del array_items
        unit = "item"
    else:
        unit = "line"
    file = ChatFile(path, lines, array("q"), array("Q"))
    for number, place, raw in lines:
        text, invalid = decode_utf8(raw)
        try:
            conversation = to_conversation(_parsed(text), file.ignored)
        except (ValueError, RecursionError) as error:
            file.bad_lines += 1
            if len(file.problems) < KEPT_PROBLEMS:
                file.problems.append((number, _reason(error)))
            continue
        file.invalid_utf8 += invalid
        file._offsets.append(place)
        file._hashes.append(_hash(conversation))
    if not len(file):
        shown = "".join(f"\n  {unit} {number}: {reason}" for number, reason in file.problems[:3])
        why = f"all {file.bad_lines} {unit}s are bad:{shown}" if file.bad_lines else "it is empty"
        raise InputError(f"{path} holds no conversation, {why}\nEach line must be one of\n{SHAPES}")
    return file


def _parsed(text: str) -> Any:
    """A JSON value. NaN, which is no JSON but what data frames write for what is missing, is null."""
    return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON ({error.msg} at column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _hash(conversation: dict[str, Any]) -> int:
    text = json.dumps(conversation, sort_keys=True)  # ASCII, so that lone surrogates do no harm
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class _Lines:
    """Lines of an open file that are not blank: iterate for (number, place, bytes), ``read`` for one by its place."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.head = file.read(8192)
        self._start = len(codecs.BOM_UTF8) if self.head.startswith(codecs.BOM_UTF8) else 0

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        self._file.seek(self._start)
        place = self._start
        for number, raw in enumerate(self._file, 1):
            if not raw.isspace():
                yield number, place, raw
            place += len(raw)

    def read(self, place: int) -> bytes:
        """The line that begins at ``place``; threads do not disturb each other, as the file position stays."""
        raw, size = b"", 16 * 1024
        while b"\n" not in raw:
            more = os.pread(self._file.fileno(), size, place + len(raw))
            if not more:
                return raw
            raw += more
            size *= 4
        return raw[: raw.index(b"\n")]

    def everything(self) -> bytes:
        """All of the file, a byte-order mark removed."""
        self._file.seek(self._start)
        return self._file.read()


def _whole_file(lines: _Lines) -> list[Any] | None:
    """The conversations of a file that is one JSON value, or None for one value a line.

    It is one value if its first line breaks off in the middle of one, or if there is but one line, a list, and that is
    no conversation in itself.
    """
    head = list(_first_two(lines))
    if not head:
        return None
    try:
        value = _parsed(decode_utf8(head[0])[0])
        if len(head) > 1 or not isinstance(value, list) or _is_message_list(value):
            return None
    except (ValueError, RecursionError) as error:
        text = decode_utf8(head[0])[0].rstrip()
        if len(head) < 2 or not isinstance(error, json.JSONDecodeError) or error.pos < len(text):
            return None
        try:
            value = _parsed(decode_utf8(lines.everything())[0])
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) and not _is_message_list(value) else [value]


def _first_two(lines: _Lines) -> Iterator[bytes]:
    for count, (_, _, raw) in enumerate(lines):
        yield raw
        if count:
            return


def _is_message_list(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & set(value[0]))


def _temporary() -> IO[bytes]:
    """A file without a name in the base directory: it is gone when it is closed, however that happens."""
    return tempfile.TemporaryFile(dir=data_dir())


def _as_lines(values: list[Any]) -> IO[bytes]:
    """A temporary file with one JSON value a line."""
    file = _temporary()
    for value in values:
        file.write(json.dumps(value).encode() + b"\n")
    file.seek(0)
    return file


def _unzipped(path: Path) -> IO[bytes]:
    """A temporary file with the contents of a gzip file, which could not be read from the middle."""
    file = _temporary()
    try:
        with gzip.open(path) as source:
            shutil.copyfileobj(source, file, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is no readable gzip file ({error}); fetch or make it again") from error
    file.seek(0)
    return file


# --- to look at -------------------------------------------------------------------------------------------------------


def describe_samples(conversations: Any, tokenizer: Tokenizer, n: int = 3, color: bool | None = None) -> str:
    """The first ``n`` conversations as they are trained on: special tokens, and which tokens are trained on.

    With ``color`` (default: whether stdout is a terminal) one coloured token after another, green where it is trained
    on; else one stretch a line, marked "learn" or "read".
    """
    color = sys.stdout.isatty() if color is None else color
    shown = []
    for number in range(min(n, len(conversations))):
        ids, mask = tokenizer.render_conversation(conversations[number])
        shown.append(
            f"sample {number + 1} of {len(conversations):,}: {len(ids)} tokens, {sum(mask)} of them trained on"
        )
        if color:
            shown.append(tokenizer.visualize_tokenization(ids[:_SHOWN_TOKENS], mask[:_SHOWN_TOKENS]))
            if len(ids) > _SHOWN_TOKENS:
                shown.append(f"... and {len(ids) - _SHOWN_TOKENS} more tokens")
            continue
        pairs = zip(mask, ids, strict=True)
        for supervised, stretch in itertools.groupby(pairs, key=lambda pair: pair[0]):
            text = tokenizer.decode([token for _, token in stretch]).replace("\n", "\\n")
            if len(text) > _SHOWN_CHARS:
                text = f"{text[:_SHOWN_CHARS]}... and {len(text) - _SHOWN_CHARS} more characters"
            shown.append(f"  {'learn' if supervised else 'read '} | {text}")
    return "\n".join(shown)
