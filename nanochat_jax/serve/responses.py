"""/v1/responses for text, which OpenAI's newer clients ask: a conversation in, one message out, streamed or not.

Nothing is kept between requests: the whole conversation comes with each (`previous_response_id` is refused), `store`
has no effect. Calls of the calculator are part of the text, as elsewhere.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, StrictBool

from nanochat_jax.serve import prompts, schemas
from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.serve.openai import ERRORS, check_model, ignored_fields, sampling, usage_of, worker_of
from nanochat_jax.serve.streaming import ClientGone, EventStream, GrowingCompletion, while_connected
from nanochat_jax.serve.worker import Generation, Worker

router = APIRouter()

Fraction = schemas.Float


class TextFormat(schemas.Body):
    type: Literal["text", "json_object", "json_schema"]
    name: schemas.Name | None = None
    schema_: schemas.JsonSchema | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class TextOptions(schemas.Body):
    format: TextFormat | None = None


class ResponsesRequest(schemas.Body):
    """OpenAI's fields; `seed`, `top_k`, `min_p` and `repetition_penalty` are extensions."""

    model: schemas.Name | None = None
    input: schemas.Str | Annotated[list[schemas.ChatMessage], Field(min_length=1, max_length=schemas.MAX_MESSAGES)]
    instructions: schemas.Str | None = None
    max_output_tokens: Annotated[schemas.Int, Field(ge=1, le=schemas.MAX_TOKENS)] | None = None
    temperature: Annotated[Fraction, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Fraction, Field(ge=0, le=1)] | None = None
    text: TextOptions | None = None
    stream: StrictBool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: None = None
    tools: schemas.Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: StrictBool | None = None
    store: StrictBool | None = Field(None, description="ignored: nothing is kept")
    metadata: dict[str, Any] | None = None
    user: schemas.Name | None = None
    seed: Annotated[schemas.Int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    top_k: Annotated[schemas.Int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[Fraction, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Fraction, Field(gt=0)] | None = None

    def as_chat(self) -> schemas.ChatRequest:
        """The same as a chat completion's request."""
        message = schemas.ChatMessage.model_validate
        said = [message({"role": "user", "content": self.input})] if isinstance(self.input, str) else self.input
        system = [message({"role": "system", "content": self.instructions})] if self.instructions else []
        alike = "temperature top_p seed top_k min_p repetition_penalty".split()
        form = self.text.format if self.text is not None else None
        wanted = None
        if form is not None:
            schema = schemas.NamedSchema(schema=form.schema_) if form.type == "json_schema" else None
            wanted = schemas.ResponseFormat(type=form.type, json_schema=schema)
        return schemas.ChatRequest(
            messages=[*system, *said],
            max_tokens=self.max_output_tokens,
            truncate_history=self.truncation == "auto" or None,
            response_format=wanted,
            **{name: getattr(self, name) for name in alike},
        )


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(BaseModel):
    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class ModelResponse(BaseModel):
    """The fields that depend on the request; OpenAI's others are there with the values that mean nothing."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    model: str
    output: list[OutputMessage]
    usage: dict[str, Any] | None


@router.post(
    "/v1/responses",
    response_model=None,
    responses={
        200: {"model": ModelResponse, "description": "the response", "content": schemas.EVENTS},
        **ERRORS,
    },
)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """The assistant's next message, in the form of OpenAI's newer API."""
    worker, ignored = worker_of(request), ignored_fields(request, body)
    check_model(body.model, worker.model, chats=True)
    chat = body.as_chat()
    try:
        params = await sampling(worker, chat)
        prompt = await prompts.of_conversation(worker, chat, params.max_tokens or worker.engine.capacity)
    except ApiError as error:
        raise _renamed(error) from None
    growing = _GrowingResponse(body, worker, worker.submit([prompt], 1, params), params)
    if body.stream:
        return EventStream(growing.generation, growing.events(), ignored)
    try:
        await while_connected(request, growing.generation, growing.collect())
    except ClientGone:
        return Response(status_code=499)
    return JSONResponse(growing.whole(), headers=ignored)


def _renamed(error: ApiError) -> ApiError:
    """An error of a chat completion's request, with the fields as this one calls them."""
    names = {"messages": "input", "response_format": "text", "max_tokens": "max_output_tokens"}
    field = (error.param or "").partition(".")[0]
    if field in names:
        error.param = (error.param or "").replace(field, names[field], 1)
        error.message = error.message.replace(field, names[field])
    return error


class _GrowingResponse:
    """A response on its way."""

    def __init__(self, body: ResponsesRequest, worker: Worker, generation: Generation, params):
        self.generation = generation
        self._body, self._params, self._model = body, params, worker.model
        self._completion = GrowingCompletion(worker.tokenizer)
        self._id, self._message_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = 0

    async def collect(self) -> None:
        async for update in self.generation:
            self._model = update.model
            self._completion.push(update)

    @property
    def _status(self) -> str:
        reason = self._completion.finish_reason
        return "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _message(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "type": "message", "id": self._message_id, "status": self._status, "role": "assistant", "content": parts,
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """The response as it is now."""
        body, done = self._body, self._completion.finish_reason is not None
        form = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
        counts = usage_of(self.generation, [self._completion])
        usage = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model.name,
            "output": [self._message([self._part(self._completion.text)])] if done else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self._params.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_p": self._params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": usage if done else None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _event(self, kind: str, **content: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        line = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return f"event: {kind}\ndata: {line}\n\n".encode()

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, the last of which has the whole response."""
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        item = {"output_index": 0}
        yield self._event("response.created", response=self.whole())
        yield self._event("response.in_progress", response=self.whole())
        yield self._event("response.output_item.added", **item, item=self._message([]))
        yield self._event("response.content_part.added", **place, part=self._part(""))
        try:
            async for update in self.generation:
                self._model = update.model
                for text, _ in self._completion.push(update):
                    yield self._event("response.output_text.delta", **place, delta=text, logprobs=[])
        except ApiError as error:
            told = error.body()["error"]
            yield self._event("error", code=told["code"], message=told["message"], param=told["param"])
            return
        text = self._completion.text
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=self._part(text))
        yield self._event("response.output_item.done", **item, item=self._message([self._part(text)]))
        yield self._event(f"response.{self._status}", response=self.whole())
