"""From new tokens to bytes: completions as text and tool calls while they grow, server-sent events, hang-ups."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.serve.logprobs import ChatLogprobs, Echo, KnownTokens, TextLogprobs
from nanochat_jax.serve.tools import ClientTool
from nanochat_jax.serve.worker import Generation, Update
from nanochat_jax.text.detokenizer import CompletionStream, Piece, PlainText, ToolCall, ToolResult, as_parts, as_text
from nanochat_jax.text.tokenizer import Tokenizer

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class GrowingCompletion:
    """One completion on its way: its tokens become text and tool calls.

    writer: writes down log-probabilities, where they are wanted. echo: the prompt, where it is part of the answer.
    silent: the prompt alone is wanted. tool: what the client calls the calculator, if it is to compute.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        writer: ChatLogprobs | TextLogprobs | None = None,
        echo: Echo | None = None,
        silent: bool = False,
        tool: ClientTool | None = None,
    ):
        self.finish_reason: str | None = None  # OpenAI's: "stop" or "length"
        self.n_tokens = 0
        self.tool_calls: list[dict[str, Any]] = []
        self._tool = tool
        self._writer, self._echo, self._silent = writer, echo, silent
        self._known, self._echo_written = KnownTokens(), False  # what is to be written down next
        self._stream = CompletionStream(tokenizer, stop)
        self._plain = PlainText()

    def push(self, update: Update) -> list[tuple[str, dict[str, str] | None]]:
        """(text, tool) of each new piece. tool: {"call": expression} or {"result": text} where the piece is one."""
        if self._silent:
            self.finish_reason = "length" if update.finished else None
            return []
        self.n_tokens += len(update.tokens)
        if self._writer is not None:
            self._known.add(update.tokens, update.logprobs, update.alternatives)
        pieces = self._stream.push(update.tokens)
        if update.finished:
            pieces += self._stream.finish()
            self.finish_reason = "length" if update.finished == "length" and not self._stream.stopped else "stop"
        last = pieces[-1] if pieces else None
        if update.finished == "tool" and self._tool is not None and isinstance(last, ToolCall):
            self.finish_reason = "tool_calls"
            self.tool_calls = [self._tool.call(last.expression)]
            pieces.pop()
        shown = [(self._plain.push([piece]), _tool(piece)) for piece in pieces]
        if update.finished and (rest := self._plain.finish()):
            shown.append((rest, None))
        return shown

    @property
    def echoed(self) -> str:
        """The prompt, where it is part of the answer."""
        return self._echo.text if self._echo is not None else ""

    def logprobs(self) -> dict[str, Any] | None:
        """Log-probabilities of the tokens since the last call, after those of an echoed prompt."""
        if self._writer is None:
            return None
        known, self._known = self._known, KnownTokens()
        if self._echo is not None and not self._echo_written:
            self._echo_written, prompt = True, self._echo.known()
            prompt.add(known.tokens, known.logprobs, known.alternatives)
            known = prompt
        return self._writer.write(known)

    @property
    def text(self) -> str:
        """Everything so far, tool calls written as ``<12+30=42>``; without one that the client is to compute."""
        return as_text(self._pieces)

    @property
    def parts(self) -> list[dict[str, str]]:
        """Everything so far as an assistant message's parts."""
        return as_parts(self._pieces)

    @property
    def _pieces(self) -> list[Piece]:
        pieces = self._stream.pieces
        return pieces[:-1] if self.tool_calls else pieces


def _tool(piece: Piece) -> dict[str, str] | None:
    match piece:
        case ToolCall(expression=expression):
            return {"call": expression}
        case ToolResult(text=text):
            return {"result": text}
    return None


class ClientGone(Exception):
    """The client hung up before the completion was done."""


async def while_connected(request: Request, generation: Generation, work: Awaitable) -> None:
    """Does `work`, which reads `generation`; closes that however it ends. Raises ClientGone if the client hangs up."""

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
        generation.close()


class EventStream(StreamingResponse):
    """Server-sent events; the generation ends when the client does."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[bytes], headers: Mapping[str, str] = NO_HEADERS):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._generation, self._events = generation, events

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


def event(data: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: ApiError) -> bytes:
    return event(error.body())
