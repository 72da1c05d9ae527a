"""What is wrong with a body, in a user's words: from the validator's findings to one sentence that names the field.

A field that takes several kinds of values ("text or a list of parts") is reported once for each of them. What is told
is the finding of the kind that fits best: the one that got deepest into the value, and there not the one that says that
the value is of another kind.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanochat_jax.serve.api_errors import ApiError

# Fields of OpenAI's that this server has only in the sense of "not used".
_UNSUPPORTED = frozenset(["suffix"])
_KINDS = {
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "none_required": "null",
}
_SHOWN_CHARS = 40

Finding = Mapping[str, Any]
Place = tuple[str | int, ...]


def explain(findings: Sequence[Finding], body: Any) -> ApiError:
    """The first problem of a body (its JSON value). findings: FastAPI's, of which each `loc` begins with "body"."""
    first = findings[0]
    if first["type"] == "json_invalid":
        at = f" at character {first['loc'][1]}" if len(first["loc"]) > 1 else ""
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}{at}")
    found = _of_one_field(findings, body)
    deepest = max(len(_place(f, body)) for f in found)
    found = [f for f in found if len(_place(f, body)) == deepest]
    place = _place(found[0], body)
    if not place:
        given = "empty" if body is None else kind_of(body)
        return ApiError(400, f"the body must be a JSON object; it is {given}")
    field = str(place[0])
    if field in _UNSUPPORTED:
        message = f"{field} is not supported by this server: leave it out"
        return ApiError(400, message, param=field, code="unsupported_parameter")
    other_kind = [f for f in found if f["type"] in _KINDS or f["type"] == "literal_error"]
    right_kind = [f for f in found if f not in other_kind]
    if right_kind:
        problem, place = _in_words(right_kind[0]), _place(right_kind[0], body)
    else:
        here = [f for f in other_kind if _place(f, body) == place]
        kinds = list(dict.fromkeys(_KINDS.get(f["type"]) or f["ctx"]["expected"] for f in here))
        problem = f"must be {' or '.join(kinds)}, not {kind_of(here[0]['input'])}"
    return ApiError(400, f"{'.'.join(map(str, place))}: {problem}", param=field)


def _of_one_field(findings: Sequence[Finding], body: Any) -> list[Finding]:
    """The first finding, and those of the other kinds of values that its field may have."""
    loc = findings[0]["loc"]
    kind = next((i for i in range(1, len(loc)) if len(_walk(loc[1 : i + 1], body)) < i), None)
    if kind is None or (findings[0]["type"] == "missing" and kind == len(loc) - 1):
        return [findings[0]]
    return [f for f in findings if f["loc"][:kind] == loc[:kind]]


def _place(finding: Finding, body: Any) -> Place:
    """Where in the body it is. The validator's `loc` also names the kinds of values that it tried."""
    loc = finding["loc"][1:]
    return (*_walk(loc[:-1], body), loc[-1]) if finding["type"] == "missing" and loc else _walk(loc, body)


def _walk(loc: Sequence[str | int], value: Any) -> Place:
    """The parts of `loc` that lead into a JSON value."""
    walked = []
    for part in loc:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            continue  # the name of a kind of values
        walked.append(part)
    return tuple(walked)


def _in_words(finding: Finding) -> str:
    """What is wrong with a value of the right kind."""
    ctx = finding.get("ctx", {})
    match finding["type"]:
        case "missing":
            return "it is missing"
        case "string_unicode":
            return "holds half a surrogate pair, which is no character"
        case "too_long":
            return f"must have at most {ctx['max_length']} entries; there are {ctx['actual_length']}"
        case "too_short" | "string_too_short":
            return "must not be empty"
        case "string_too_long":
            return f"must have at most {ctx['max_length']} characters"
        case "greater_than_equal":
            return f"must be at least {ctx['ge']}, not {kind_of(finding['input'])}"
        case "less_than_equal":
            return f"must be at most {ctx['le']}, not {kind_of(finding['input'])}"
        case "less_than":
            return f"must be less than {ctx['lt']}, not {kind_of(finding['input'])}"
        case "value_error":
            return str(ctx["error"])
    return finding["msg"]


def kind_of(value: Any) -> str:
    """A JSON value as a person would call it: itself where it is short."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    shown = json.dumps(value)
    return shown if len(shown) <= _SHOWN_CHARS else "a long text" if isinstance(value, str) else "such a long number"
