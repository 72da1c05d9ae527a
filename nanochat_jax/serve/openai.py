"""The OpenAI-compatible API: /v1/chat/completions, /v1/completions, /v1/models (`responses` has /v1/responses).

What is ours, beyond OpenAI's documentation:

- Request fields `top_k` (0 = all), `min_p`, `repetition_penalty` (as vLLM's) and `truncate_history` (chat: drop the
  oldest exchanges of a conversation that does not fit, instead of a 400). A completion of `max_tokens` that does not
  fit the context ends with "length" where the context does. `model` may be left out.
  `continue_final_message` and `add_generation_prompt` are vLLM's, but a last message of the assistant is continued
  unless one of them says otherwise. Fields that the server does not know are ignored; the header X-Ignored-Fields
  names them.
- Calls of the calculator are part of the text, as ``<12+30=42>``, unless the client offers it (`tools`). A stream
  also tells them apart: a chunk whose delta
  (completions: whose choice) has ``"tool": {"call": "12+30"}`` carries ``<12+30`` as its content, the one with
  ``"tool": {"result": "42"}`` carries ``=42>``; a call that got no result is closed by ``>`` at the head of whatever
  comes next. Unstreamed, `message.parts` lists the pieces as ``{"type": "text" | "python" | "python_output", "text"}``.
  An assistant message may be sent back as its text or with such a list as its content.
- `usage.prompt_tokens_details.cached_tokens`: the part of the prompt that was in the cache. `completion_tokens` counts
  every generated token, the end token and the calculator's included.
- `system_fingerprint` is ``RUN-step-N``: the checkpoint that wrote the completion.
- A stream that the server cannot finish ends with ``data: {"error": ...}`` and ``data: [DONE]``.
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.serve import grammars, prompts, schemas, tools
from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.serve.logprobs import ChatLogprobs, Echo, TextLogprobs
from nanochat_jax.serve.streaming import (
    ClientGone,
    EventStream,
    GrowingCompletion,
    error_event,
    event,
    while_connected,
)
from nanochat_jax.serve.worker import Generation, ServedModel, Worker
from nanochat_jax.text import chat_format

router = APIRouter()

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Error, "description": text}
    for status, text in {
        400: "a request that cannot be answered; param names the field",
        404: "no such model",
        429: "all slots and the queue are full; see Retry-After",
        500: "the model stopped working",
        503: "the server is shutting down",
    }.items()
}


def worker_of(request: Request) -> Worker:
    return request.app.state.worker


def ignored_fields(request: Request, body: schemas.Body) -> dict[str, str]:
    return request.app.state.ignored.headers(body)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={
        200: {"model": schemas.ChatCompletion, "description": "the completion", "content": schemas.EVENTS},
        **ERRORS,
    },
)
async def chat_completions(body: schemas.ChatRequest, request: Request) -> Response:
    """The assistant's next message."""
    worker, ignored = worker_of(request), ignored_fields(request, body)
    check_model(body.model, worker.model, chats=True)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    tool = tools.offered(body)
    params = await sampling(worker, body)
    if tool is not None and tool.must and params.grammar is not None:
        raise ApiError(400, "tool_choice asks for a call, and another field for another text", param="tool_choice")
    prompt = await prompts.of_conversation(worker, body, params.max_tokens or worker.engine.capacity)
    if tool is not None:
        begin = (worker.tokenizer.encode_special(chat_format.PYTHON_START),) if tool.must else ()
        params = replace(params, return_tool_calls=True, begin=begin)
    return await _respond(ChatShape(tool), worker, body, request, [prompt], params, ignored)


@router.post(
    "/v1/completions",
    response_model=None,
    responses={
        200: {"model": schemas.TextCompletion, "description": "the continuation", "content": schemas.EVENTS},
        **ERRORS,
    },
)
async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
    """The continuation of a text."""
    worker, ignored = worker_of(request), ignored_fields(request, body)
    check_model(body.model, worker.model)
    if body.best_of not in (None, 1, body.n or 1):
        message = "best_of is not supported: ask for n completions and choose among them"
        raise ApiError(400, message, param="best_of", code="unsupported_parameter")
    if body.max_tokens == 0 and not body.echo:
        message = "max_tokens: must be at least 1 (0 is for echo, where the prompt alone is wanted)"
        raise ApiError(400, message, param="max_tokens")
    params = await sampling(worker, body)
    given = await prompts.of_texts(worker, body)
    if len(given) * (body.n or 1) > schemas.MAX_CHOICES:
        message = f"{len(given)} prompts with n={body.n} are more than {schemas.MAX_CHOICES} completions at once"
        raise ApiError(400, message, param="n")
    echoed = prompts.as_texts(worker, body, given) if body.echo else None
    return await _respond(TextShape(), worker, body, request, given, params, ignored, echoed)


@router.get("/v1/models", response_model=schemas.ModelList)
async def models(request: Request) -> dict:
    """The one model that is served."""
    return {"object": "list", "data": [_describe(worker_of(request))]}


@router.get("/v1/models/{name}", response_model=schemas.ModelInfo, responses={404: ERRORS[404]})
async def model(name: str, request: Request) -> dict:
    """The served model, by its name."""
    worker = worker_of(request)
    check_model(name, worker.model)
    return _describe(worker)


def _describe(worker: Worker) -> dict:
    model, defaults, capacity = worker.model, worker.defaults, worker.engine.capacity
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "nanochat_jax",
        "stage": model.stage,
        "step": model.step,
        "context_length": capacity,
        "max_model_len": capacity,
        "chat": model.chats,
        "defaults": {
            "temperature": defaults.temperature,
            "top_k": defaults.top_k,
            "max_tokens": min(defaults.max_tokens or capacity, capacity),
        },
    }


async def sampling(worker: Worker, body: schemas.Sampled) -> SamplingParams:
    """What the request asks for. Raises ApiError for tokens that the vocabulary does not have, and bad grammars."""
    params, vocab_size = body.sampling(worker.defaults), worker.engine.config.vocab_size
    for token, _ in params.logit_bias:
        if token >= vocab_size:
            message = f"logit_bias: there is no token {token}; the vocabulary has 0 to {vocab_size - 1}"
            raise ApiError(400, message, param="logit_bias")
    return replace(params, grammar=await grammars.of_body(body, worker.tokenizer))


def check_model(name: str | None, model: ServedModel, chats: bool = False) -> None:
    """Raises ApiError where the request is for another model, or (chats) for one that holds no conversations."""
    if name is not None and name != model.name:
        message = f"the model {name!r} does not exist; this server has {model.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    if chats and not model.chats:
        raise ApiError(
            400,
            f"{model.name} is a base model: it continues text and holds no conversation. Use /v1/completions, "
            "or serve a chat model (scripts.serve --stage=sft)",
            param="model",
            code="model_not_chat",
        )


# --- responses --------------------------------------------------------------------------------------------------------


class _Shape:
    """How completions are written down; the two kinds of them differ in this only."""

    prefix, whole, chunk = "", "", ""
    writer: type[ChatLogprobs] | type[TextLogprobs]

    def __init__(self, tool: tools.ClientTool | None = None):
        self.tool = tool
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}

    def envelope(self, kind: str, model: ServedModel, choices: list[dict], **more) -> dict:
        named = {"model": model.name, "system_fingerprint": model.fingerprint}
        return {**self.head, "object": kind, **named, "choices": choices, **more}

    def choice(self, index: int, completion: GrowingCompletion) -> dict:
        raise NotImplementedError

    def piece(self, index: int, text: str, tool: dict | None, first: bool, finish_reason: str | None) -> dict:
        raise NotImplementedError


class ChatShape(_Shape):
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"
    writer = ChatLogprobs

    def choice(self, index, completion):
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        message["parts"] = completion.parts
        if completion.tool_calls:
            message |= {"content": completion.text or None, "tool_calls": completion.tool_calls}
        known = completion.logprobs()
        return {"index": index, "message": message, "finish_reason": completion.finish_reason, "logprobs": known}

    def piece(self, index, text, tool, first, finish_reason):
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        if tool is not None:
            delta["tool"] = tool
        return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}


class TextShape(_Shape):
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"
    writer = TextLogprobs

    def choice(self, index, completion):
        text, known = completion.echoed + completion.text, completion.logprobs()
        return {"index": index, "text": text, "finish_reason": completion.finish_reason, "logprobs": known}

    def piece(self, index, text, tool, first, finish_reason):
        piece = {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": None}
        return {**piece, "tool": tool} if tool is not None else piece


async def _respond(
    shape: _Shape,
    worker: Worker,
    body: schemas.Sampled,
    request: Request,
    prompts: list[list[int]],
    params: SamplingParams,
    headers: dict[str, str],
    echoed: list[tuple[str, int]] | None = None,
) -> Response:
    """echoed: (text, tokens put before it) of each prompt, where it is part of the answer."""
    n = body.n or 1
    generation = worker.submit(prompts, n, params)
    completions = []
    for i, one in enumerate(generation.requests):
        writer = shape.writer(worker.token_names) if params.logprobs is not None else None
        echo = Echo(one, *echoed[i // n]) if echoed is not None else None
        silent = body.max_tokens == 0
        completions.append(GrowingCompletion(worker.tokenizer, params.stop, writer, echo, silent, shape.tool))
    model = worker.model
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(generation, _chunks(shape, model, generation, completions, with_usage), headers)

    async def collect() -> None:
        nonlocal model
        async for update in generation:
            model = update.model
            completions[update.index].push(update)

    try:
        await while_connected(request, generation, collect())
    except ClientGone:
        return Response(status_code=499)
    choices = [shape.choice(i, completion) for i, completion in enumerate(completions)]
    envelope = shape.envelope(shape.whole, model, choices, usage=usage_of(generation, completions))
    return JSONResponse(envelope, headers=headers)


async def _chunks(
    shape: _Shape,
    model: ServedModel,
    generation: Generation,
    completions: Sequence[GrowingCompletion],
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """The events of a stream, those of one update in one piece."""
    usage = {"usage": None} if with_usage else {}
    begun: set[int] = set()
    try:
        async for update in generation:
            index, completion, model = update.index, completions[update.index], update.model
            new: list[tuple[str, dict | None]] = completion.push(update)
            choices = []
            if index not in begun:
                choices.append(shape.piece(index, completion.echoed, None, True, None))
                begun.add(index)
            n_before = len(choices)
            choices += [shape.piece(index, text, tool, False, None) for text, tool in new]
            for number, call in enumerate(completion.tool_calls):
                delta = {"tool_calls": [{"index": number, **call}]}
                choices.append({"index": index, "delta": delta, "finish_reason": None, "logprobs": None})
            if completion.finish_reason:
                choices.append(shape.piece(index, "", None, False, completion.finish_reason))
            if (known := completion.logprobs()) is not None:
                if len(choices) == n_before:  # the text of these tokens is to come
                    choices.append(shape.piece(index, "", None, False, None))
                choices[n_before]["logprobs"] = known
            if choices:
                envelopes = (shape.envelope(shape.chunk, model, [choice], **usage) for choice in choices)
                yield b"".join(map(event, envelopes))
        if with_usage:
            yield event(shape.envelope(shape.chunk, model, [], usage=usage_of(generation, completions)))
    except ApiError as error:
        yield error_event(error)
    yield b"data: [DONE]\n\n"


def usage_of(generation: Generation, completions: Sequence[GrowingCompletion]) -> dict:
    prompt, completion = generation.prompt_tokens, sum(completion.n_tokens for completion in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }
