"""What a completion must follow: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_...`."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from nanochat_jax.serve import schemas
from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.text import grammar
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import InputError


async def of_body(body: schemas.Sampled, tokenizer: Tokenizer) -> str | None:
    """The grammar that a request asks for, or None. Raises ApiError, naming the field."""
    wanted = list(_wanted(body))
    if len(wanted) > 1:
        fields = " and ".join(field for field, *_ in wanted)
        raise ApiError(400, f"a completion can follow one grammar, not those of {fields}", param=wanted[1][0])
    for field, make, source in wanted:
        try:
            return await asyncio.to_thread(_checked, make, source, tokenizer)
        except InputError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from None
    return None


def _checked(make, source, tokenizer: Tokenizer) -> str:
    made = make(source)
    grammar.check(made, tokenizer)
    return made


def _wanted(body: schemas.Sampled) -> Iterator[tuple[str, Any, Any]]:
    """(field, what makes a grammar of it, its value) of each field that asks for something."""
    form = body.response_format
    if form is not None and form.type == "json_object":
        yield "response_format", grammar.of_json_schema, {"type": "object"}
    if form is not None and form.type == "json_schema":
        schema = form.json_schema.schema_ if form.json_schema is not None else None
        yield "response_format", _of_schema, schema
    outputs = body.structured_outputs or schemas.StructuredOutputs.model_validate({})
    for field, name in (("structured_outputs", "json_"), ("guided_json", "guided_json")):
        if (schema := getattr(outputs if name == "json_" else body, name)) is not None:
            yield field, _of_schema, schema
    if outputs.json_object:
        yield "structured_outputs", grammar.of_json_schema, {"type": "object"}
    makers = {"regex": grammar.of_regex, "choice": grammar.of_choice, "grammar": grammar.of_lark}
    for name, make in makers.items():
        for field, value in (
            ("structured_outputs", getattr(outputs, name)),
            (f"guided_{name}", getattr(body, f"guided_{name}")),
        ):
            if value is not None:
                yield field, make, value


def _of_schema(schema: Any) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise InputError(f"the schema is no JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise InputError("a JSON schema is needed, which is an object")
    return grammar.of_json_schema({} if schema is True else schema)
