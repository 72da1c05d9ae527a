"""Finds the program in what a model answers to a programming question, and what the question lends to it.

Right code is to be counted as right however it is wrapped: in fences of any kind, closed or not, one or several, amid
prose, indented. The block that defines the function asked for is the program.
"""

import ast
import re
import textwrap
import threading
import warnings
from collections.abc import Iterator

_OPENING = re.compile(r"(`{3,}|~{3,})[ \t]*([^\n`]*)\n")
_FENCE_LINE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[^\n`]*$", re.MULTILINE)
_FENCE = re.compile(r"(?:`{3,}|~{3,})[ \t]*(?:python3?\b|py3?\b)?[ \t]*", re.IGNORECASE)
_PYTHON = re.compile(r"\W*(?:|python\d?|py\d?|ipython\d?)\b", re.IGNORECASE)
_LANGUAGE = re.compile(r"\A(?:python3?|py3?)[ \t]*\n", re.IGNORECASE)
_CODE_LINE = re.compile(r"(?:async\s+def|def|class|import|from)\s|@\w|[A-Za-z_]\w*\s*(?::[^=]+)?=[^=]")
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_MOST_TRIES = 200  # ends of a text that are tried; an answer is some hundred tokens

_quiet = threading.Lock()  # answers are judged in threads, and warnings are switched off for all of them together


def find_program(completion: str, entry_point: str) -> str | None:
    """The part of the completion that is Python and defines ``entry_point``; None where there is none.

    Of several blocks the first one that does, and not by its signature alone; definitions in the others are put before
    it.
    """
    blocks = list(_blocks(completion))
    candidates = [*blocks, *_unwrapped(completion)]
    for number, code in sorted(enumerate(map(_dedent, candidates)), key=lambda pair: _is_stub(pair[1], entry_point)):
        if _defines(code, entry_point):
            others = [_dedent(block) for i, block in enumerate(blocks) if i != number] if number < len(blocks) else []
            return "\n\n".join([*_helpers(others, entry_point), code])
    for code in map(_dedent, candidates):
        if (found := _trimmed(code, entry_point)) is not None:
            return found
    return None


def prelude(prompt: str, entry_point: str) -> str | None:
    """What comes before the function in the prompt: imports, constants, helpers. None where it cannot be told."""
    for text in (prompt, f"{prompt}\n    pass\n"):
        tree = _parsed(text)
        for node in reversed(tree.body if tree else []):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == entry_point:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                return "\n".join(text.splitlines()[: first - 1])
    return None


def assembled(*parts: str) -> str:
    """The parts of a program one after the other, imports from the future first, as Python demands."""
    program = "\n\n".join(parts)
    future = dict.fromkeys(line.strip() for line in _FUTURE.findall(program))
    return "\n".join([*future, _FUTURE.sub("", program)]) if future else program


# --- candidates -------------------------------------------------------------------------------------------------------


def _blocks(text: str) -> Iterator[str]:
    """The contents of the fences, those marked as Python or as nothing first; an open one reaches to the end."""
    found, at = [], 0
    while (opening := _OPENING.search(text, at)) is not None:
        fence, info = opening.groups()
        closing = re.compile(rf"^[ \t]*{re.escape(fence)}{re.escape(fence[0])}*[ \t]*$", re.MULTILINE)
        end = closing.search(text, opening.end())
        found.append((bool(_PYTHON.match(info)), text[opening.end() : end.start() if end else len(text)]))
        at = end.end() if end else len(text)
    for python in (True, False):
        yield from (code for marked, code in found if marked is python)


def _unwrapped(text: str) -> Iterator[str]:
    """The text with its fences taken for something else: from the first to the last, none at all, as it is."""
    lines = list(_FENCE_LINE.finditer(text))
    if len(lines) > 1:
        yield text[lines[0].end() : lines[-1].start()]
    yield _FENCE_LINE.sub("", text)
    yield _FENCE.sub("\n", text)
    yield text


def _dedent(code: str) -> str:
    """Without its indentation, and without the name of the language on a line of its own."""
    return _LANGUAGE.sub("", textwrap.dedent(code.replace("\r\n", "\n")).strip())


def _trimmed(text: str, entry_point: str) -> str | None:
    """The longest stretch of whole lines around the function that is Python: prose before and after is left out, and
    so is what a limit on tokens has cut off."""
    lines = text.split("\n")
    name = re.compile(rf"(?:(?:async\s+)?def\s+{re.escape(entry_point)}\b|{re.escape(entry_point)}\s*=)")
    anchor = next((i for i, line in enumerate(lines) if name.match(line)), None)
    if anchor is None:
        return None
    tries = _MOST_TRIES
    for first in (i for i in range(anchor + 1) if _CODE_LINE.match(lines[i])):
        end = len(lines)
        while end > anchor and tries > 0:
            tries -= 1
            code = "\n".join(lines[first:end])
            error = _syntax_error(code)
            if error is None:
                if _defines(code, entry_point):
                    return code
                break
            # what comes before the line at fault may be right, or the fault began there
            fault = first + (error.lineno or 0) - 1 if isinstance(error, SyntaxError) else end
            end = fault if anchor < fault < end else end - 1
    return None


# --- code -------------------------------------------------------------------------------------------------------------


def _syntax_error(code: str) -> Exception | None:
    try:
        with _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return error
    return None


def _parsed(code: str) -> ast.Module | None:
    if _syntax_error(code) is not None:
        return None
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def _defines(code: str, name: str) -> bool:
    """Whether running the code binds the name at its top level."""
    tree = _parsed(code)
    return tree is not None and any(name in _bound(node) for node in _statements(tree.body))


def _is_stub(code: str, name: str) -> bool:
    """Whether the function has no body but its docstring, as where an answer begins by repeating the question."""
    tree = _parsed(code)
    for node in tree.body if tree else []:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return all(
                isinstance(one, ast.Pass) or (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
                for one in node.body
            )
    return False


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, also those inside if, try and with."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for inner in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, inner, []))


def _bound(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
        return {node.target.id}
    return set()


def _helpers(blocks: list[str], entry_point: str) -> list[str]:
    """Imports, definitions and constants of the blocks that are Python: running these can do no harm."""
    found = []
    for tree in map(_parsed, blocks):
        for node in tree.body if tree else []:
            harmless = isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
            if isinstance(node, ast.Assign):
                harmless = _is_literal(node.value)
            if harmless and entry_point not in _bound(node):
                found.append(ast.unparse(node))
    return found


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True
