"""The calculator the assistant may call: arithmetic, and counting letters in a string.

Works from any thread, evaluates nothing: the expression is parsed and its tree is walked against a short list of what
is allowed, with a limit on size before every step that could grow. The reference hands the same expressions to
Python's `eval`; answers agree with it, except that

- names are never looked up (the reference sees its own local variables: `formula.count('o')` gives 3 there);
- `...`, tuples and attribute chains other than `.count(text)` and a trailing `.real`, `.imag`, `.numerator`,
  `.denominator` of the count give None; the empty tuple `()` keeps its odd reference answer;
- instead of three seconds of wall clock, limits: 256 characters, integers of 1,000 digits.
"""

import ast
import operator

MAX_LENGTH = 256
MAX_BITS = 3322  # of an integer: about 1,000 decimal digits
MAX_DEPTH = 100

_ARITHMETIC = set("0123456789*+-/.() ")
_STRINGS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'\"()._ ")
_REFUSED = (  # substrings the reference refuses, inside quotes too; training data has its answers
    "__ import exec eval compile open file input raw_input globals locals vars dir getattr setattr delattr hasattr"
).split()
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_COUNT_ATTRIBUTES = ("real", "imag", "numerator", "denominator")

Answer = int | float | tuple[()]


class _Refused(Exception):
    pass


def use_calculator(expression: str) -> Answer | None:
    """The value of an expression, or None if it is malformed, refused, too large or has none (reference behaviour).

    Commas are dropped first ("1,000+5" is 1005, and inside quotes too). Then either arithmetic of numbers with
    + - * / // and parentheses (no powers), or `"text".count("part")`. The assistant reads `str()` of the answer.
    """
    expression = expression.replace(",", "")
    if len(expression) > MAX_LENGTH:
        return None
    characters = set(expression)
    if characters <= _ARITHMETIC:
        if "**" in expression:
            return None
        evaluate = _arithmetic
    elif characters <= _STRINGS:
        lowered = expression.lower()
        if any(word in lowered for word in _REFUSED) or ".count(" not in expression:
            return None
        evaluate = _string_count
    else:
        return None
    try:
        # parsed only, never compiled: the compiler is what would print warnings about "1 (2)"
        return evaluate(ast.parse(expression.lstrip(" "), mode="eval").body, 0)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, _Refused):
        return None


def _arithmetic(node: ast.expr, depth: int) -> Answer:
    if depth > MAX_DEPTH:
        raise _Refused
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Tuple(elts=[]) if depth == 0:
            return ()
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            value = _arithmetic(operand, depth + 1)
            return _UNARY[type(op)](value)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _arithmetic(left, depth + 1), _arithmetic(right, depth + 1)
            if isinstance(a, int) and isinstance(b, int) and a.bit_length() + b.bit_length() > MAX_BITS:
                raise _Refused
            return _BINARY[type(op)](a, b)
    raise _Refused


def _string_count(node: ast.expr, depth: int) -> Answer:
    match node:
        case ast.Attribute(value=count, attr=name) if name in _COUNT_ATTRIBUTES and depth < MAX_DEPTH:
            return getattr(_string_count(count, depth + 1), name)
        case ast.Call(func=ast.Attribute(value=text, attr="count"), args=[part], keywords=[]):
            return _string(text).count(_string(part))
    raise _Refused


def _string(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise _Refused
