"""The model's calculator as a tool of OpenAI's: offered by the client, called by the model, answered by the client.

These models are trained with one tool, so a request may offer one: a function called like `CALCULATOR`, whose only
parameter is a text, the expression. Then a call ends the completion ("tool_calls") instead of being computed here, and
the conversation that comes back with its result is continued. Without `tools` calls are computed here and part of the
text.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_jax.serve import schemas
from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.text.prompts import MessageError, parts_of_text

CALCULATOR = ("calculator", "calculate", "python")


@dataclass(frozen=True)
class ClientTool:
    """The calculator as a client calls it. must: the completion is to be a call of it."""

    name: str
    parameter: str
    must: bool

    def call(self, expression: str) -> dict[str, Any]:
        """A call as an assistant message's `tool_calls` have it."""
        arguments = json.dumps({self.parameter: expression}, ensure_ascii=False)
        function = {"name": self.name, "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def offered(body: schemas.ChatRequest) -> ClientTool | None:
    """The tool that a request offers; None where there is none, or the model is to call none. Raises ApiError for
    others than the calculator."""
    choice = body.tool_choice
    if not body.tools:
        if choice is None or choice in ("none", "auto"):
            return None
        raise ApiError(400, "tool_choice asks for a tool, but tools is empty", param="tool_choice")
    if choice == "none":
        return None
    found = [(tool.function.name, _parameter(tool.function)) for tool in body.tools]
    name, parameter = found[0]
    if len(found) > 1 or parameter is None:
        raise ApiError(
            400,
            "tools: this model was trained with one tool, a calculator. Offer one function called 'calculator' with "
            "one text parameter, or leave tools out: then the server computes, and calls are part of the text",
            param="tools",
            code="unsupported_parameter",
        )
    if isinstance(choice, schemas.NamedTool) and choice.function.name != name:
        raise ApiError(400, f"tool_choice: there is no tool {choice.function.name!r}", param="tool_choice")
    return ClientTool(name, parameter, choice not in (None, "auto"))


def _parameter(function: schemas.Function) -> str | None:
    """What the calculator's expression is called; None for a function that is not the calculator."""
    properties = (function.parameters or {}).get("properties") or {"expression": {"type": "string"}}
    if function.name.lower() not in CALCULATOR or not isinstance(properties, dict) or len(properties) != 1:
        return None
    ((name, kind),) = properties.items()
    return name if isinstance(kind, dict) and kind.get("type", "string") == "string" else None


def folded(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without tool calls and tools' results: both become parts of the assistant's message, as in training.

    Raises MessageError for a result without its call, or the call of another tool.
    """
    out: list[dict[str, Any]] = []
    places: dict[str, int] = {}  # call -> where its result belongs, among the parts of the last message
    for index, message in enumerate(messages):
        role, content, calls = message["role"], message.get("content"), message.get("tool_calls") or []
        if role == "tool":
            place = places.get(message.get("tool_call_id") or "")
            if place is None:
                raise MessageError("there is no call with this tool_call_id before it", index)
            text = content if isinstance(content, str) else "".join(_text(part) for part in content or [])
            out[-1]["content"].insert(place, {"type": "python_output", "text": text})
            places = {call: at + (at >= place) for call, at in places.items()}
            continue
        goes_on = role == "assistant" and bool(places)
        if not calls and not goes_on:
            out.append({"role": role, "content": content})
            places = {}
            continue
        parts = parts_of_text(content or "") if content is None or isinstance(content, str) else list(content)
        if goes_on:
            parts = [*out.pop()["content"], *parts]
        places = {}
        for call in calls:
            parts.append({"type": "python", "text": _expression(call, index)})
            places[call["id"]] = len(parts)
        out.append({"role": role, "content": parts})
    return out


def _text(part: Any) -> str:
    return part if isinstance(part, str) else part["text"]


def _expression(call: dict[str, Any], index: int) -> str:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        arguments = None
    values = list(arguments.values()) if isinstance(arguments, dict) else []
    if function["name"].lower() not in CALCULATOR or len(values) != 1 or not isinstance(values[0], str):
        raise MessageError("this model knows one tool, the calculator, with one text argument", index, "tool_calls")
    return values[0]
