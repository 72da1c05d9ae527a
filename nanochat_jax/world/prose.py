"""Real English prose that every Python installation brings along: the language reference and library docstrings.

The demo has no network, so this is the only text in it that people wrote for other people. Sources are read as files
(`ast`, never an import): the topics of `pydoc` and the docstrings of a fixed list of standard-library modules. Code,
doctests, tables and lists of arguments are dropped; what is left is plain paragraphs. The text depends on the Python
version (the generated world does not). A document belongs to "train" or "val" by the hash of its text.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from nanochat_jax.world.chance import SPLITS, side

MODULES = (
    "abc argparse ast asyncio/base_events asyncio/events asyncio/locks asyncio/streams asyncio/tasks bdb bisect calendar "
    "cmd code codecs collections/__init__ concurrent/futures/_base configparser contextlib copy csv ctypes/util "
    "dataclasses datetime decimal difflib dis doctest email/charset email/header email/message email/policy "
    "email/utils enum filecmp fileinput fnmatch fractions ftplib functools getopt getpass gettext glob gzip heapq "
    "html/parser http/client http/cookiejar http/server imaplib inspect ipaddress json/__init__ json/decoder "
    "json/encoder locale logging/__init__ logging/config logging/handlers mailbox mimetypes multiprocessing/managers "
    "multiprocessing/pool netrc numbers operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib "
    "poplib pprint profile pydoc queue random reprlib sched selectors shelve shlex shutil smtplib socket socketserver "
    "statistics string subprocess symtable tarfile tempfile textwrap threading timeit tkinter/__init__ "
    "token tokenize trace traceback turtle types typing unittest/case unittest/loader unittest/mock unittest/suite "
    "urllib/parse urllib/request urllib/robotparser uuid warnings wave weakref webbrowser wsgiref/handlers "
    "xml/dom/minidom xml/sax/handler xmlrpc/client xmlrpc/server zipfile zoneinfo/_common"
).split()

_MARKUP = re.compile(r"(?<!\w)[*_`]{1,3}(?=\w)|(?<=[\w.,)])[*_`]{1,2}(?!\w)|\(\*[^)]*\*\)")
_CODE = re.compile(r">>>|[{}<>=|\\@#~^$]|::|->|__|\w\(|\w_\w|\w\.\w+\.\w|%[a-z]|--|\+\+|\[\w*\]")
_SENTENCE = re.compile(r"(?:^|(?<=[.!?] ))[A-Z][^.!?]*[.!?]")


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of `text` that read as sentences, as one line each."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if not lines or any(re.match(r"\s*(?:[*+\-|=.:]|\d+[.)])", line) for line in lines):
            continue
        indents = {len(line) - len(line.lstrip()) for line in lines[1:]}
        if len(indents) > 1:  # a definition list, a table or code
            continue
        line = _MARKUP.sub("", " ".join(block.split()))
        if _reads_well(line):
            yield line


def _reads_well(line: str) -> bool:
    """Whether `line` is sentences: long enough, ends with a full stop, mostly lower-case words, no code."""
    if len(line) < 60 or not line[0].isupper() or line[-1] not in ".!?" or not line.isascii() or _CODE.search(line):
        return False
    words = line.split()
    plain = sum(1 for w in words if re.fullmatch(r"\(?[a-z]+(?:['-][a-z]+)?[.,;:)!?]*", w))
    return plain >= 0.8 * len(words) and sum(map(len, words)) < 8 * len(words)


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
        path = root / f"{module}.py"
        if not path.is_file():
            path = root / module / "__init__.py"  # modules that later Pythons made into packages
        if not path.is_file():
            continue  # and those that later Pythons dropped: the list is for several versions
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield text


@lru_cache(maxsize=1)
def _all_documents() -> tuple[str, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    out: list[str] = []
    gathered: list[str] = []

    def close() -> None:
        if gathered:
            out.append("\n".join(gathered))
            gathered.clear()

    for source in (_topics(root), _docstrings(root)):
        for text in source:
            for paragraph in _paragraphs(text):
                if paragraph not in seen:
                    seen.add(paragraph)
                    gathered.append(paragraph)
                    if sum(map(len, gathered)) > 900:
                        close()
            if sum(map(len, gathered)) > 300:  # short docstrings share a document with their neighbors
                close()
        close()
    return tuple(out)


def python_prose(split: str | None = None) -> Iterator[str]:
    """Documents of plain English from the installed Python, each once, in a fixed order.

    With `split` ("train" or "val") only that side's documents (about nine in ten, one in ten); no paragraph occurs
    twice anywhere. Raises FileNotFoundError, naming the remedy, where Python came without its documentation.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'val', not {split!r}")
    for document in _all_documents():
        if split is None or side("prose", document) == split:
            yield document
