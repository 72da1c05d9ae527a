"""A scripted server for the tests of the chat page: it answers exactly what a test told it to, misbehaviour included.

In a thread (`Stub`), each request takes the next script; run as a program (`python tests/page_stub.py PORT`), every
answer counts slowly, so that a test can kill the process in the middle of one. The wire format is that of
nanochat_jax.serve; the last tests of test_page.py hold the page against the real server.
"""

import asyncio
import json
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from nanochat_jax.serve import page


@dataclass(frozen=True)
class Tool:
    """A call of the calculator and its answer."""

    expression: str
    result: str | None


@dataclass(frozen=True)
class Die:
    """The connection breaks off here."""


@dataclass(frozen=True)
class Raw:
    """Bytes as they are, in a network packet of their own."""

    data: bytes


@dataclass(frozen=True)
class Fail:
    """An HTTP error in place of a stream (`status`), or an error event in the middle of one (status 0)."""

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": "error", "param": None, "code": self.code}}


class Gate:
    """The stream waits here until the test opens it."""

    def __init__(self):
        self.open = threading.Event().set
        self._is_open = self.open.__self__.is_set

    async def wait(self, request: Request) -> bool:
        """True when opened, False when the client went away."""
        while not self._is_open():
            if await request.is_disconnected():
                return False
            await asyncio.sleep(0.01)
        return True


Step = str | Tool | Die | Raw | Fail | Gate


class Stub:
    """The server: `script(...)` queues an answer; `requests` holds what the page sent; `cancelled` counts hang-ups."""

    def __init__(self, port: int = 0, slow: bool = False):
        self.slow = slow
        self._streams = 0  # that have not ended
        self.reset()
        self._socket = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(self._app(), log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def reset(self) -> None:
        """Forgets everything; for the next test, whose page has not asked anything yet."""
        end = time.monotonic() + 20
        while self._streams:
            assert time.monotonic() < end, "a stream of the test before has not ended"
            time.sleep(0.005)
        self.model: dict[str, Any] = {"stage": "sft", "step": 300, "chat": True, "context_length": 256, "defaults": {}}
        self.usage = {"prompt_tokens": 40, "completion_tokens": 20}
        self.finish_reason = "stop"
        self.api_key: str | None = None
        self.health = 200
        self.requests: list[dict[str, Any]] = []
        self.cancelled = 0
        self._scripts: deque[tuple[Step, ...]] = deque()

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(5)
        self._socket.close()

    def serve_forever(self):
        self._server.run(sockets=[self._socket])

    def script(self, *steps: Step) -> None:
        self._scripts.append(steps)

    # -- the app

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/")
        async def index():
            html, policy = page.load()
            return HTMLResponse(html, headers={"Content-Security-Policy": policy})

        @app.get("/health")
        async def health():
            state = {"status": "ok", "model": "tiny-sft", "step": self.model["step"]}
            return JSONResponse(state, self.health)

        @app.get("/v1/models")
        async def models(request: Request):
            return self._refused(request) or JSONResponse(
                {"object": "list", "data": [{"id": "tiny-sft", "object": "model", **self.model}]}
            )

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            return await self._answer(request, lambda text: {"delta": {"content": text}})

        @app.post("/v1/completions")
        async def completions(request: Request):
            return await self._answer(request, lambda text: {"text": text})

        return app

    def _refused(self, request: Request) -> JSONResponse | None:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse(Fail(401, "a key is needed", "invalid_api_key").body(), 401)
        return None

    async def _answer(self, request: Request, wrap):
        refused = self._refused(request)
        if refused:
            return refused
        self.requests.append(await request.json())
        steps = self._scripts.popleft() if self._scripts else ("An answer.",)
        if self.slow:
            steps = tuple(f"{number} " for number in range(1000))
        if isinstance(steps[0], Fail) and steps[0].status:
            return JSONResponse(steps[0].body(), steps[0].status, steps[0].headers)
        return StreamingResponse(self._stream(request, steps, wrap), media_type="text/event-stream")

    async def _stream(self, request: Request, steps, wrap):
        def chunk(choice: dict[str, Any], **more) -> bytes:
            data = {"choices": [{"index": 0, "finish_reason": None, **choice}], "model": "tiny-sft", **more}
            return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()

        open_call = False
        self._streams += 1
        try:
            yield chunk({"delta": {"role": "assistant", "content": ""}, **wrap("")})
            for step in steps:
                if isinstance(step, Gate):
                    if not await step.wait(request):
                        raise asyncio.CancelledError
                elif isinstance(step, Die):
                    raise ConnectionAbortedError("as the test asked")
                elif isinstance(step, Raw):
                    yield step.data
                    await asyncio.sleep(0.03)
                elif isinstance(step, Fail):
                    yield f"data: {json.dumps(step.body())}\n\n".encode()
                    return
                elif isinstance(step, Tool):
                    yield chunk({"delta": {"content": f"<{step.expression}", "tool": {"call": step.expression}}})
                    if step.result is not None:
                        result = {"content": f"={step.result}>", "tool": {"result": step.result}}
                        yield chunk({"delta": result})
                    open_call = step.result is None
                else:
                    yield chunk(wrap(">" + step if open_call else step))
                    open_call = False
                if self.slow:
                    await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self._streams -= 1
        yield chunk({**wrap(""), "finish_reason": self.finish_reason})
        yield f"data: {json.dumps({'choices': [], 'usage': self.usage})}\n\n".encode()
        yield b"data: [DONE]\n\n"


if __name__ == "__main__":
    Stub(int(sys.argv[1]), slow=True).serve_forever()
