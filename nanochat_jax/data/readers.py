"""One file of text, read as documents: parquet, JSON lines, plain text and Markdown.

A reader yields ``Document``s in file order and always the same ones for the same bytes. Damaged input is either an
error that names the file (empty, binary, no such column, nothing usable) or repaired and counted (invalid UTF-8, bad
JSON lines).
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.utils.errors import UserError

# A text file up to this size is one document. A larger one is cut at the first blank line after PIECE_CHARS characters
# or, where there is none, at the first line end after PIECE_CHARS_MAX; a single line is never cut, however long.
WHOLE_FILE_BYTES = 64 * 1024
PIECE_CHARS = 4_000
PIECE_CHARS_MAX = 16_000
# In text files, a line that holds only this ends a document (the convention of several published collections).
SEPARATOR_LINE = "<|endoftext|>"
# Part of the identity of rows made from text: raise it when any rule above changes.
READER_VERSION = 1

_SNIFF_BYTES = 8192


class DataError(UserError, ValueError):
    """Data that cannot be used; the message names the file and the remedy."""


class Document(NamedTuple):
    """One document, and how many invalid byte sequences in it were replaced by U+FFFD."""

    text: str
    invalid_utf8: int = 0


class BadLine(NamedTuple):
    """A JSON line left out, as "file:line: reason"."""

    message: str


def read_documents(path: Path, column: str = "text", start: int = 0) -> Iterator[Document | BadLine]:
    """Documents of a file from number ``start`` on, and the lines left out after that many documents.

    ``column`` is the parquet column or JSON key.

    Raises DataError naming the file if it is empty, binary, damaged, or holds no document.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; remove it or put text into it")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'files without a suffix'}; use one of {', '.join(READERS)}"
        )
    return reader(path, column, start)


def document_count(path: Path) -> int | None:
    """How many documents a file holds, where its metadata tells (parquet), else None."""
    return _open_parquet(path).metadata.num_rows if path.suffix.lower() == ".parquet" else None


# --- parquet --------------------------------------------------------------------------------------------------------


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable parquet file ({error}); remove it or fetch it again") from error


def _check_column(path: Path, file: pq.ParquetFile, column: str) -> None:
    schema = file.schema_arrow
    if column not in schema.names:
        raise DataError(f"{path} has no column {column!r}; its columns are {', '.join(schema.names)}: name one of them")
    kind = schema.field(column).type
    if _stored(kind) not in (*_TEXT, *_BYTES, pa.null()):
        raise DataError(f"{path}: column {column!r} holds {kind}, not text")


_TEXT = (pa.string(), pa.large_string(), pa.string_view())
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())


def _stored(kind: pa.DataType) -> pa.DataType:
    """What a column's values are: those of its dictionary, or what an extension type is stored as."""
    while isinstance(kind, pa.DictionaryType | pa.BaseExtensionType):
        kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind.storage_type
    return kind


def row_group_texts(path: Path, file: pq.ParquetFile, group: int, column: str) -> list[Document]:
    """The documents of one row group. A null becomes an empty document, so that row numbers stay document numbers."""
    try:
        values = _plain(file.read_row_group(group, columns=[column]).column(0))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: row group {group} is damaged ({error}); fetch the file again") from error
    if values.type not in _BYTES:
        try:
            return [Document(text or "") for text in values.to_pylist()]
        except UnicodeDecodeError:  # the file promises UTF-8 and does not keep it
            values = values.cast(pa.large_binary())
    return [Document(*decode_utf8(raw or b"")) for raw in values.to_pylist()]


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text or bytes as themselves, however the file encodes them."""
    while isinstance(values.type, pa.DictionaryType | pa.BaseExtensionType):
        if isinstance(values.type, pa.DictionaryType):
            values = values.cast(values.type.value_type)
        else:
            values = pa.chunked_array([chunk.storage for chunk in values.chunks], values.type.storage_type)
    return values


def _read_parquet(path: Path, column: str, start: int) -> Iterator[Document]:
    file = _open_parquet(path)
    _check_column(path, file, column)
    if file.metadata.num_rows == 0:
        raise DataError(f"{path} has no rows; remove it")
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if start >= rows:
            start -= rows
            continue
        yield from row_group_texts(path, file, group, column)[start:]
        start = 0


# --- text and JSON lines ----------------------------------------------------------------------------------------------


def decode_utf8(raw: bytes) -> tuple[str, int]:
    """The text and the number of replacement characters put in for invalid bytes."""
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "replace")
        return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a text file with their line ends, a byte-order mark removed. Raises DataError for binary contents."""
    with open(path, "rb") as file:
        head = file.read(_SNIFF_BYTES)
        if b"\0" in head:
            utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            remedy = "it looks like UTF-16: convert it to UTF-8" if utf16 else "remove it or convert it to UTF-8 text"
            raise DataError(f"{path} is a binary file, not text; {remedy}")
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        yield from file


def _read_text(path: Path, column: str, start: int) -> Iterator[Document]:
    whole = path.stat().st_size <= WHOLE_FILE_BYTES
    pieces: list[str] = []
    chars = invalid = count = 0
    found = False

    def finish() -> Iterator[Document]:
        nonlocal pieces, chars, invalid, count, found
        text = "".join(pieces).strip("\r\n")
        if text.strip():
            found = True
            if count >= start:
                yield Document(text, invalid)
            count += 1
            invalid = 0
        pieces, chars = [], 0

    for raw in _lines(path):
        line, replaced = decode_utf8(raw)
        stripped = line.strip()
        if stripped == SEPARATOR_LINE:
            yield from finish()
            continue
        pieces.append(line)
        chars += len(line)
        invalid += replaced
        if not whole and chars >= PIECE_CHARS and (not stripped or chars >= PIECE_CHARS_MAX):
            yield from finish()
    yield from finish()
    if not found:
        raise DataError(f"{path} holds nothing but white space; remove it or put text into it")


def _read_jsonl(path: Path, column: str, start: int) -> Iterator[Document | BadLine]:
    count = bad = 0
    first_bad = ""
    for number, raw in enumerate(_lines(path), 1):
        if not raw.strip():
            continue
        line, invalid = decode_utf8(raw)
        text, reason = _text_of_json(line, column)
        if text is None:
            bad += 1
            first_bad = first_bad or f"line {number}: {reason}"
            if count >= start:
                yield BadLine(f"{path.name}:{number}: {reason}")
            continue
        text, surrogates = _without_surrogates(text)
        if count >= start:
            yield Document(text, invalid + surrogates)
        count += 1
    if count == 0:
        why = f"all {bad} lines are bad, {first_bad}" if bad else "it has only blank lines"
        raise DataError(f"{path} has no usable line ({why}); each line must be a JSON object with a string {column!r}")


def _text_of_json(line: str, column: str) -> tuple[str | None, str]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, f"no JSON ({error})"
    if not isinstance(value, dict):
        return None, f"a JSON {type(value).__name__}, not an object"
    if column not in value:
        return None, f"no key {column!r} (keys: {', '.join(list(value)[:8])})"
    if not isinstance(value[column], str):
        return None, f"{column!r} is {type(value[column]).__name__}, not a string"
    return value[column], ""


def _without_surrogates(text: str) -> tuple[str, int]:
    """JSON escapes can spell half of a UTF-16 pair, which is no character and no UTF-8: put U+FFFD in its place."""
    try:
        text.encode("utf-8")
        return text, 0
    except UnicodeEncodeError:
        repaired = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
        return repaired, repaired.count("\ufffd") - text.count("\ufffd")


READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_text, ".md": _read_text}
