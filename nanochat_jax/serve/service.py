"""What every endpoint needs: the worker, the tokenizer, the defaults; prompts made and checked, answers collected."""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import StreamingResponse

from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.serve.worker import Job, Sampling, ServedModel, Update, Worker
from nanochat_jax.text.detokenizer import AnswerStream, Piece, PlainText, ToolCall, ToolResult, as_parts
from nanochat_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SHORT_TEXT = 4096  # characters that the event loop tokenizes itself: half a millisecond, ten times what a thread costs


@dataclass(frozen=True)
class Defaults:
    """Sampling where a request does not say (the reference's defaults)."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512


class Service:
    """One served model. log_prompts: write prompts and answers to the log, which nothing else does."""

    def __init__(self, worker: Worker, tokenizer: Tokenizer, defaults: Defaults, log_prompts: bool = False):
        self.worker, self.tokenizer, self.defaults, self.log_prompts = worker, tokenizer, defaults, log_prompts
        self._longest = max(len(token) for token in tokenizer.ranks)

    @property
    def model(self) -> ServedModel:
        return self.worker.model

    @property
    def capacity(self) -> int:
        """Positions for a prompt and its answer."""
        return self.worker.engine.capacity

    def sampling(
        self,
        max_tokens: int | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Sampling:
        """Settings with the defaults filled in; without a seed, a new one."""
        return Sampling(
            self.defaults.max_tokens if max_tokens is None else max_tokens,
            self.defaults.temperature if temperature is None else temperature,
            self.defaults.top_k if top_k is None else top_k,
            1.0 if top_p is None else top_p,
            secrets.randbits(31) if seed is None else seed,
        )

    def overlong(self, characters: int) -> int:
        """A lower bound of the tokens of a text, if it is certain not to fit the context; else 0.

        It spares a text of a megabyte the tokenizer, whose split pattern cannot take everything at that length.
        """
        least = characters // self._longest
        return least if least > self.capacity else 0

    async def tokenize(self, characters: int, function: Callable, *arguments):
        """Makes ids of a text of so many characters; a long one on another thread, as it takes a tenth of a second."""
        if characters <= SHORT_TEXT:
            return function(*arguments)
        return await asyncio.to_thread(function, *arguments)

    def submit(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> Job:
        job = self.worker.submit(prompts, n, sampling)
        if self.log_prompts:
            for prompt in prompts:
                logger.info("prompt: %s", json.dumps(self.tokenizer.decode(prompt), ensure_ascii=False))
        return job

    def book(self, job: Job, answers: Sequence["Answer"]) -> None:
        """Counts a job that is over."""
        firsts = {id(r.prompt): r for r in job.requests}
        self.worker.metrics.prompt(sum(len(r.prompt) for r in firsts.values()), sum(r.reused for r in firsts.values()))
        if self.log_prompts:
            for answer in answers:
                text = json.dumps(answer.stream.text, ensure_ascii=False)
                logger.info("answer (%s): %s", answer.finish_reason or "cancelled", text)


class Answer:
    """One answer on its way: its tokens become text and tool calls."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stream = AnswerStream(tokenizer, stop)
        self.finish_reason: str | None = None
        self.n_tokens = 0
        self._plain = PlainText()

    def push(self, update: Update) -> list[tuple[str, dict[str, str] | None]]:
        """(text, tool) of each new piece. tool: {"call": expression} or {"result": text} where the piece is one."""
        self.n_tokens += len(update.tokens)
        pieces = self.stream.push(update.tokens)
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif update.finished:
            pieces += self.stream.finish()
            self.finish_reason = "stop" if update.finished == "end" or self.stream.stopped else "length"
        shown = [(self._plain.push([piece]), _tool(piece)) for piece in pieces]
        if self.finish_reason and (rest := self._plain.finish()):
            shown.append((rest, None))
        return shown

    @property
    def parts(self) -> list[dict[str, str]]:
        return as_parts(self.stream.pieces)


def _tool(piece: Piece) -> dict[str, str] | None:
    match piece:
        case ToolCall(expression=expression):
            return {"call": expression}
        case ToolResult(text=text):
            return {"result": text}
    return None


class ClientGone(Exception):
    """Nobody is waiting for the answer any longer."""


async def while_connected(request: Request, job: Job, work: Awaitable) -> None:
    """Does `work`, which reads `job`; closes the job however it ends. Raises ClientGone if the client hangs up."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hung_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        job.close()


class EventStream(StreamingResponse):
    """Server-sent events; the job ends when the client does."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: AsyncIterator[bytes]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._job, self._events = job, events

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


def event(data: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: ApiError) -> bytes:
    return event(error.body())
