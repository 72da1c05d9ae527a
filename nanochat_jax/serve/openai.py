"""The OpenAI-compatible API: /v1/chat/completions, /v1/completions, /v1/models.

What is ours, beyond OpenAI's documentation:

- Request fields `top_k` (0 = all) and `truncate_history` (chat: drop the oldest exchanges of a conversation that does
  not fit, instead of a 400). `max_tokens` is the longest answer; one that does not fit the context ends with "length"
  where the context does. `model` may be left out.
- Calls of the calculator are part of the text, as ``<12+30=42>``. A stream also tells them apart: a chunk whose delta
  (completions: whose choice) has ``"tool": {"call": "12+30"}`` carries ``<12+30`` as its content, the one with
  ``"tool": {"result": "42"}`` carries ``=42>``; a call that got no result is closed by ``>`` at the head of whatever
  comes next. Unstreamed, `message.parts` lists the pieces as ``{"type": "text" | "python" | "python_output", "text"}``.
  An assistant message may be sent back as its text or with such a list as its content.
- `usage.prompt_tokens_details.cached_tokens`: the part of the prompt that was in the cache. `completion_tokens` counts
  every generated token, the end token and the calculator's included.
- `system_fingerprint` is ``RUN-step-N``: the checkpoint that answered.
- A stream that the server cannot finish ends with ``data: {"error": ...}`` and ``data: [DONE]``.
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nanochat_jax.serve import schemas
from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.serve.service import Answer, ClientGone, EventStream, Service, error_event, event, while_connected
from nanochat_jax.serve.worker import Job, Sampling, ServedModel
from nanochat_jax.text.detokenizer import ContextOverflow, MessageError, chat_prompt, fit_history

router = APIRouter()
COMPLETION_TOKENS = 16  # of /v1/completions where max_tokens is left out, as OpenAI's

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Error, "description": text}
    for status, text in {
        400: "a request that cannot be answered; param names the field",
        404: "no such model",
        429: "all slots and the queue are full; see Retry-After",
        500: "the model stopped working",
        503: "the server is shutting down",
    }.items()
}


def _service(request: Request) -> Service:
    return request.app.state.service


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={
        200: {"model": schemas.ChatCompletion, "description": "the answer", "content": schemas.EVENTS},
        **_ERRORS,
    },
)
async def chat_completions(body: schemas.ChatRequest, request: Request) -> Response:
    """The assistant's next message."""
    service = _service(request)
    _check_model(body.model, service.model)
    if not service.model.chats:
        raise ApiError(
            400,
            f"{service.model.name} is a base model: it continues text and holds no conversation. Use /v1/completions, "
            "or serve a chat model (scripts.serve --stage=sft)",
            param="model",
            code="model_not_chat",
        )
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    sampling = service.sampling(limit, body.temperature, body.top_k, body.top_p, body.seed)
    prompt = await conversation_prompt(
        service, [m.model_dump(include={"role", "content"}) for m in body.messages], sampling, body.truncate_history
    )
    return await _respond(Chat(service, body), request, [prompt], sampling)


@router.post(
    "/v1/completions",
    response_model=None,
    responses={
        200: {"model": schemas.Completion, "description": "the continuation", "content": schemas.EVENTS},
        **_ERRORS,
    },
)
async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
    """The continuation of a text."""
    service = _service(request)
    _check_model(body.model, service.model)
    limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = service.sampling(limit, body.temperature, body.top_k, body.top_p, body.seed)
    prompts = await _text_prompts(service, body.prompt)
    if len(prompts) * (body.n or 1) > schemas.MAX_CHOICES:
        message = f"{len(prompts)} prompts with n={body.n} are more than {schemas.MAX_CHOICES} answers at once"
        raise ApiError(400, message, param="n")
    return await _respond(Text(service, body), request, prompts, sampling)


@router.get("/v1/models", response_model=schemas.Models)
async def models(request: Request) -> dict:
    """The one model that is served."""
    return {"object": "list", "data": [_describe(_service(request))]}


@router.get("/v1/models/{name}", response_model=schemas.Model, responses={404: _ERRORS[404]})
async def model(name: str, request: Request) -> dict:
    """The served model, by its name."""
    service = _service(request)
    _check_model(name, service.model)
    return _describe(service)


def _describe(service: Service) -> dict:
    model, defaults = service.model, service.defaults
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "nanochat_jax",
        "stage": model.stage,
        "step": model.step,
        "context_length": service.capacity,
        "chat": model.chats,
        "defaults": {
            "temperature": defaults.temperature,
            "top_k": defaults.top_k,
            "max_tokens": min(defaults.max_tokens, service.capacity),
        },
    }


def _check_model(name: str | None, model: ServedModel) -> None:
    if name is not None and name != model.name:
        message = f"the model {name!r} does not exist; this server has {model.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


# --- prompts ----------------------------------------------------------------------------------------------------------


async def conversation_prompt(
    service: Service, messages: list[dict], sampling: Sampling, truncate: bool | None = False
) -> list[int]:
    """A conversation's ids. truncate: drop its oldest exchanges where it is too long (and keep room for an answer: what
    was asked for, at most half the context).

    Raises ApiError for a conversation that has no prompt, or none that fits the context.
    """
    newest = messages[-1:] if truncate else messages
    _check_length(service, sum(_characters(m["content"]) for m in newest), "messages")
    characters = sum(_characters(m["content"]) for m in messages)
    try:
        if truncate:
            reserve = min(sampling.max_tokens, service.capacity // 2)
            prompt, _ = await service.tokenize(
                characters, fit_history, messages, service.tokenizer, service.capacity, reserve
            )
            return prompt
        prompt = await service.tokenize(characters, chat_prompt, messages, service.tokenizer)
        if len(prompt) > service.capacity:
            raise ContextOverflow(len(prompt), service.capacity)
        return prompt
    except MessageError as error:
        param = "messages" if error.index is None else f"messages.{error.index}"
        raise ApiError(400, str(error), param=param) from None
    except ContextOverflow as error:
        raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from None


def _characters(content: str | list[dict]) -> int:
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def _check_length(service: Service, characters: int, param: str) -> None:
    if least := service.overlong(characters):
        raise ApiError(
            400,
            f"this model's context is {service.capacity} tokens, but the {param} have at least {least}; shorten them",
            param=param,
            code="context_length_exceeded",
        )
    if characters > schemas.MAX_TEXT:
        raise ApiError(400, f"the {param} have {characters} characters, more than {schemas.MAX_TEXT}", param=param)


async def _text_prompts(service: Service, prompt: Any) -> list[list[int]]:
    given = [""] if prompt is None else [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    prompts = []
    for text in given:
        if isinstance(text, str):
            _check_length(service, len(text), "prompt")
            ids = [service.tokenizer.bos_id, *await service.tokenize(len(text), service.tokenizer.encode_text, text)]
        else:
            ids = text
            if max(ids) >= service.worker.engine.config.vocab_size:
                size = service.worker.engine.config.vocab_size
                raise ApiError(
                    400, f"the prompt holds id {max(ids)}; the vocabulary has 0 to {size - 1}", param="prompt"
                )
        if len(ids) > service.capacity:
            error = ContextOverflow(len(ids), service.capacity)
            raise ApiError(
                400, str(error).replace("messages", "prompt"), param="prompt", code="context_length_exceeded"
            )
        prompts.append(ids)
    return prompts


def _is_ids(prompt: Any) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


# --- answers ----------------------------------------------------------------------------------------------------------


class _Shape:
    """How answers are written down; the two kinds of completion differ in this only."""

    prefix, whole, chunk = "", "", ""

    def __init__(self, service: Service, body: schemas.Sampled):
        self.service, self.body = service, body
        self.stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}

    def envelope(self, kind: str, model: ServedModel, choices: list[dict], **more) -> dict:
        named = {"model": model.name, "system_fingerprint": model.fingerprint}
        return {**self.head, "object": kind, **named, "choices": choices, **more}

    def choice(self, index: int, answer: Answer) -> dict:
        raise NotImplementedError

    def piece(self, index: int, text: str, tool: dict | None, first: bool, finish_reason: str | None) -> dict:
        raise NotImplementedError


class Chat(_Shape):
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index, answer):
        message = {"role": "assistant", "content": answer.stream.text, "refusal": None, "parts": answer.parts}
        return {"index": index, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}

    def piece(self, index, text, tool, first, finish_reason):
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        if tool is not None:
            delta["tool"] = tool
        return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}


class Text(_Shape):
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(self, index, answer):
        text = answer.stream.text
        return {"index": index, "text": text, "finish_reason": answer.finish_reason, "logprobs": None}

    def piece(self, index, text, tool, first, finish_reason):
        piece = {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": None}
        return {**piece, "tool": tool} if tool is not None else piece


async def _respond(shape: _Shape, request: Request, prompts: list[list[int]], sampling: Sampling) -> Response:
    service = shape.service
    n = shape.body.n or 1
    answers = [Answer(service.tokenizer, shape.stop) for _ in range(len(prompts) * n)]
    job = service.submit(prompts, n, sampling)
    if shape.body.stream:
        options = shape.body.stream_options
        return EventStream(job, _chunks(shape, job, answers, n, bool(options and options.include_usage)))
    model = service.model

    async def collect() -> None:
        nonlocal model
        async for update in job:
            model = update.model
            answers[update.index].push(update)
            if answers[update.index].stream.stopped:
                job.cancel(update.index)

    try:
        await while_connected(request, job, collect())
    except ClientGone:
        return Response(status_code=499)
    finally:
        service.book(job, answers)
    choices = [shape.choice(i, answer) for i, answer in enumerate(answers)]
    return JSONResponse(shape.envelope(shape.whole, model, choices, usage=_usage(job, answers, n)))


async def _chunks(
    shape: _Shape, job: Job, answers: Sequence[Answer], n: int, include_usage: bool
) -> AsyncIterator[bytes]:
    usage = {"usage": None} if include_usage else {}
    begun: set[int] = set()
    model = shape.service.model
    try:
        async for update in job:
            index, answer, model = update.index, answers[update.index], update.model
            new: list[tuple[str, dict | None]] = answer.push(update)
            if answer.stream.stopped:
                job.cancel(index)
            choices = []
            if index not in begun and (new or answer.finish_reason):
                choices.append(shape.piece(index, "", None, True, None))
                begun.add(index)
            choices += [shape.piece(index, text, tool, False, None) for text, tool in new]
            if answer.finish_reason:
                choices.append(shape.piece(index, "", None, False, answer.finish_reason))
            if choices:
                envelopes = (shape.envelope(shape.chunk, model, [choice], **usage) for choice in choices)
                yield b"".join(map(event, envelopes))
        if include_usage:
            yield event(shape.envelope(shape.chunk, model, [], usage=_usage(job, answers, n)))
    except ApiError as error:
        yield error_event(error)
    finally:
        shape.service.book(job, answers)
    yield b"data: [DONE]\n\n"


def _usage(job: Job, answers: Sequence[Answer], n: int) -> dict:
    prompts = job.requests[::n]  # the n answers to one prompt share it
    prompt, completion = sum(len(r.prompt) for r in prompts), sum(answer.n_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(r.reused for r in prompts)},
    }
