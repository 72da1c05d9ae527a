"""Real English prose that every Python installation brings along: the language reference and library docstrings.

The demo has no network, so this is the only text in it that people wrote for other people. Sources are read as files
(`ast`, never an import): the topics of `pydoc` and the docstrings of a fixed list of standard-library modules. Code,
doctests, tables and lists of arguments are dropped; what is left is plain sentences, in their paragraphs. The text
depends on the Python
version (the generated world does not). A document belongs to "train" or "val" by the hash of its text.
"""

from __future__ import annotations

import ast
import contextlib
import json
import platform
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from nanochat_jax.demo_world.draw import SPLITS, side
from nanochat_jax.utils.paths import data_dir, sha256_hex, write_atomic

MODULES = (
    "abc argparse ast asyncio/base_events asyncio/events asyncio/locks asyncio/streams asyncio/tasks bdb bisect "
    "calendar cmd code codecs collections/__init__ concurrent/futures/_base configparser contextlib copy csv "
    "ctypes/util dataclasses datetime decimal difflib dis doctest email/charset email/header email/message "
    "email/policy email/utils enum filecmp fileinput fnmatch fractions ftplib functools getopt getpass gettext glob "
    "gzip heapq html/parser http/client http/cookiejar http/server imaplib inspect ipaddress json/__init__ "
    "json/decoder json/encoder locale logging/__init__ logging/config logging/handlers mailbox mimetypes "
    "multiprocessing/managers multiprocessing/pool netrc numbers operator optparse os pathlib pdb pickle "
    "pickletools pkgutil platform plistlib poplib pprint profile pydoc queue random reprlib sched selectors shelve "
    "shlex shutil smtplib socket socketserver statistics string subprocess symtable tarfile tempfile textwrap "
    "threading timeit tkinter/__init__ token tokenize trace traceback turtle types typing unittest/case "
    "unittest/loader unittest/mock unittest/suite urllib/parse urllib/request urllib/robotparser uuid warnings wave "
    "weakref webbrowser wsgiref/handlers xml/dom/minidom xml/sax/handler xmlrpc/client xmlrpc/server zipfile "
    "zoneinfo/_common "
).split()

_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "–": "-", "—": "-"})
_MARKUP = re.compile(r"(?<!\w)[*_`]{1,3}(?=\w)|(?<=[\w.,)])[*_`]{1,2}(?!\w)|\(\*[^)]*\*\)")
_CODE = re.compile(r">>>|[{}<>=|\\@#~^$&+]|::|->|__|\w\(|\w_\w|\w\.\w|%[a-z]|--|\[|\]|\w:\w|[a-z][A-Z]")
_BETWEEN_SENTENCES = re.compile(r"(?<=[a-z)\"'][.!?])\s+(?=[A-Z])")
_PLAIN_WORD = re.compile(r"[\"'(]*(?:[a-z]+(?:['-][a-z]+)*|[A-Z][a-z]*)[\"')]*[.,;:!?]*[\"')]*")
_BULLET = re.compile(r"\s*(?:[*-]|\d+\.)\s+(?=[A-Z])")
_NOT_PROSE = re.compile(r"\s*(?:[*+\-|=.:>]|\d+[.)])")


def _paragraphs(text: str) -> Iterator[list[str]]:
    """The paragraphs of `text`, each as the list of its sentences that read well; without those that have none."""
    for block in re.split(r"\n\s*\n", text.translate(_ASCII)):
        lines = _BULLET.sub("", block, count=1).splitlines()
        if not lines or any(_NOT_PROSE.match(line) for line in lines):
            continue
        if len({len(line) - len(line.lstrip()) for line in lines[1:]}) > 1:  # a definition list, a table or code
            continue
        sentences = _BETWEEN_SENTENCES.split(_MARKUP.sub("", " ".join(" ".join(lines).split())))
        good = [sentence for sentence in sentences if _reads_well(sentence)]
        if good:
            yield good


def _reads_well(sentence: str) -> bool:
    """Whether this is a sentence of plain words: long enough, a capital first, a full stop last, no code inside."""
    if not 30 <= len(sentence) <= 400 or not sentence.isascii() or _CODE.search(sentence):
        return False
    if not sentence[0].isupper() or sentence[-1] not in ".!?" or sentence.count('"') % 2:
        return False
    words = sentence.split()
    plain = sum(1 for word in words if _PLAIN_WORD.fullmatch(word))
    return len(words) >= 5 and plain >= 0.9 * len(words)


def _topics(root: Path) -> Iterator[str]:
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: this Python came without its own documentation. Install the complete standard library "
            "(on Debian and Ubuntu: the package libpython3-stdlib), or use another Python."
        )
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def _docstrings(root: Path) -> Iterator[str]:
    for module in MODULES:
        path = _source(root, module)
        if path is not None:
            yield from _docstrings_below(ast.parse(path.read_text(encoding="utf-8")))


def _source(root: Path, module: str) -> Path | None:
    """The file of a module, which later Pythons may have made into a package; None where they have dropped it."""
    places = root / f"{module}.py", root / module / "__init__.py"
    return next((path for path in places if path.is_file()), None)


def _docstrings_below(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The docstring of `node` and of what is defined directly in it, in order."""
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings_below(child)


@lru_cache(maxsize=1)
def _all_documents() -> tuple[str, ...]:
    """The prose of this Python. Reading it out of the sources takes two seconds, so it is cached in the base directory,
    under a name that changes with the sources and with this file."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = [root / "pydoc_data" / "topics.py", *filter(None, (_source(root, module) for module in MODULES))]
    facts = [[str(path), *_size_and_time(path)] for path in sources]
    key = sha256_hex(json.dumps([platform.python_version(), facts]).encode(), Path(__file__).read_bytes())
    name = f"python-prose-{key[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return tuple(json.loads((data_dir() / name).read_text(encoding="utf-8")))
    out = _read_documents(root)
    with contextlib.suppress(OSError):  # a full or read-only disk: the next process reads the sources again
        write_atomic(data_dir() / name, json.dumps(out))
    return out


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        facts = path.stat()
    except OSError:
        return 0, 0
    return facts.st_size, facts.st_mtime_ns


def _read_documents(root: Path) -> tuple[str, ...]:
    seen: set[str] = set()
    out: list[str] = []
    gathered: list[str] = []

    def close() -> None:
        if gathered:
            out.append("\n".join(gathered))
            gathered.clear()

    for source in (_topics(root), _docstrings(root)):
        for text in source:
            for sentences in _paragraphs(text):
                new = [sentence for sentence in sentences if sentence not in seen]
                seen.update(new)
                if new:
                    gathered.append(" ".join(new))
                if sum(map(len, gathered)) > 900:
                    close()
            if sum(map(len, gathered)) > 300:  # short docstrings share a document with their neighbors
                close()
        close()
    return tuple(out)


def python_prose(split: str | None = None) -> Iterator[str]:
    """Documents of plain English from the installed Python, each once, in a fixed order.

    With `split` ("train" or "val") only that side's documents (about nine in ten, one in ten); no sentence occurs
    twice anywhere. Raises FileNotFoundError, naming the remedy, where Python came without its documentation.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'val', not {split!r}")
    for document in _all_documents():
        if split is None or side("prose", document) == split:
            yield document
