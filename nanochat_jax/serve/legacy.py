"""The reference's own endpoints, for its clients: /chat/completions (an event stream), /stats and /health.

As the reference's: the same limits and complaints, in the same order; ``data: {"token": ..., "gpu": 0}`` events and a
last ``data: {"done": true}``. Unlike there: nothing blocks, a worker is a slot rather than a GPU, tool calls are
``<12+30=42>`` instead of the names of special tokens, and a conversation longer than the context is a 400.
"""

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nanochat_jax.serve import schemas
from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.serve.openai import conversation_prompt
from nanochat_jax.serve.service import Answer, EventStream, Service, error_event, event
from nanochat_jax.serve.worker import Job

router = APIRouter()

MAX_MESSAGES, MAX_MESSAGE, MAX_CONVERSATION = 500, 8000, 32000


@router.post(
    "/chat/completions",
    response_class=Response,
    responses={
        200: {"content": schemas.EVENTS, "description": "the answer's events"},
        400: {"model": schemas.Detail, "description": "outside a limit"},
        422: {"model": schemas.Detail, "description": "not of the right form"},
        429: {"model": schemas.Detail, "description": "all slots and the queue are full; see Retry-After"},
        500: {"model": schemas.Detail, "description": "the model stopped working"},
        503: {"model": schemas.Detail, "description": "the server is shutting down"},
    },
)
async def chat(body: schemas.LegacyRequest, request: Request) -> Response:
    """The assistant's next message, as events."""
    service: Service = request.app.state.service
    if problem := _problem(body):
        return JSONResponse({"detail": problem}, 400)
    if not service.model.chats:
        return JSONResponse({"detail": f"{service.model.name} is a base model and holds no conversation"}, 400)
    sampling = service.sampling(body.max_tokens, body.temperature, body.top_k)
    try:
        messages = [m.model_dump() for m in body.messages]
        prompt = await conversation_prompt(service, messages, sampling)
        job = service.submit([prompt], 1, sampling)
    except ApiError as error:
        return JSONResponse({"detail": error.message}, error.status, error.headers)
    return EventStream(job, _events(service, job))


def _problem(body: schemas.LegacyRequest) -> str | None:
    """The first of the reference's complaints (spec section 11.4)."""
    messages = body.messages
    if not messages:
        return "At least one message is required"
    if len(messages) > MAX_MESSAGES:
        return f"Too many messages. Maximum {MAX_MESSAGES} messages allowed per request"
    for i, message in enumerate(messages):
        if not message.content:
            return f"Message {i} has empty content"
        if len(message.content) > MAX_MESSAGE:
            return f"Message {i} is too long. Maximum {MAX_MESSAGE} characters allowed per message"
    if sum(len(m.content) for m in messages) > MAX_CONVERSATION:
        return f"Total conversation is too long. Maximum {MAX_CONVERSATION} characters allowed"
    for i, message in enumerate(messages):
        if message.role not in ("user", "assistant"):
            return f"Message {i} has invalid role. Must be 'user', 'assistant', or 'system'"
    if body.temperature is not None and not 0 <= body.temperature <= 2:
        return "Temperature must be between 0.0 and 2.0"
    if body.top_k is not None and not 1 <= body.top_k <= 200:
        return "top_k must be between 1 and 200"
    if body.max_tokens is not None and not 1 <= body.max_tokens <= 4096:
        return "max_tokens must be between 1 and 4096"
    return None


async def _events(service: Service, job: Job) -> AsyncIterator[bytes]:
    answer = Answer(service.tokenizer)
    try:
        async for update in job:
            text = "".join(text for text, _ in answer.push(update))
            if text:
                yield event({"token": text, "gpu": 0})
    except ApiError as error:
        yield error_event(error)
    finally:
        service.book(job, [answer])
    yield event({"done": True})


@router.get(
    "/health",
    response_model=schemas.Health,
    responses={503: {"model": schemas.Health, "description": "the decode thread has failed or hangs"}},
)
async def health(request: Request) -> Response:
    """Whether the server works; answered at once whatever the model is doing."""
    worker = request.app.state.service.worker
    slots, running = worker.engine.slots, worker.running
    healthy = worker.healthy
    state = {
        "status": "ok" if healthy else "error",
        "ready": healthy,
        "num_gpus": len(worker.devices),
        "available_workers": slots - running,
        "model": worker.model.name,
        "step": worker.model.step,
        "running": running,
        "waiting": worker.waiting,
    }
    return JSONResponse(state, 200 if healthy else 503)


@router.get("/stats", response_model=schemas.Stats)
async def stats(request: Request) -> dict:
    """The slots, which the reference calls workers."""
    worker = request.app.state.service.worker
    engine, running, devices = worker.engine, worker.running, worker.devices
    per_device = engine.slots // len(devices)
    return {
        "total_workers": engine.slots,
        "available_workers": engine.slots - running,
        "busy_workers": running,
        "workers": [{"gpu_id": i // per_device, "device": devices[i // per_device]} for i in range(engine.slots)],
    }
