"""Streams of completions, as a client of the server reads them: over bare sockets.

The benchmark's clients share the machine with the server, and an HTTP library takes about as much of it for a request
(2 ms) as the server does: it would be measured too.
"""

import asyncio
import contextlib
import itertools
import json
import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PROMPTS = ("Once upon a time", "The sky is", "In the morning the", "A good friend", "Water flows", "There was a town")
EXTRA: dict[str, Any] = {}  # fields of every request, beside its own


@dataclass(frozen=True)
class Stream:
    """One stream as its reader saw it: seconds to the first text and to the end, tokens, why it ended, and the seconds
    between what came (a piece may have several tokens)."""

    first: float
    seconds: float
    tokens: int
    reason: str | None
    gaps: tuple[float, ...] = ()

    @property
    def per_token(self) -> float:
        return self.seconds / max(self.tokens, 1)


def percentile(values: Sequence[float], q: float) -> float:
    """The value that q percent of `values` do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * q / 100) - 1)]


def as_vllm(streams: Sequence[Stream], seconds: float) -> dict[str, float]:
    """The figures of vLLM's serving benchmark, as it calls them: requests and tokens per second, time to the first
    token, time per output token after it, and time between what arrives (here pieces of several tokens), in ms."""
    values = {
        "ttft": [s.first for s in streams],
        "tpot": [(s.seconds - s.first) / (s.tokens - 1) for s in streams if s.tokens > 1],
        "itl": [gap for s in streams for gap in s.gaps],
    }
    rates = {
        "request_throughput": len(streams) / seconds,
        "output_throughput": sum(s.tokens for s in streams) / seconds,
    }
    times = {f"p{q}_{name}_ms": 1e3 * percentile(v, q) for name, v in values.items() if v for q in (50, 99)}
    return rates | times


VLLM_FIGURES = ["request_throughput", "output_throughput"]
VLLM_FIGURES += [f"p{q}_{name}_ms" for name in ("ttft", "tpot", "itl") for q in (50, 99)]


def events(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of server-sent events, without the closing [DONE]."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


class Connection:
    """One kept-alive HTTP/1.1 connection to the server, opened when it is first needed."""

    def __init__(self, address: str):
        self._host, _, port = address.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def request(self, method: str, path: str, data: bytes = b"") -> AsyncGenerator[bytes]:
        """The pieces of the answer's body. A request that is dropped half-way closes the connection."""
        reader, writer = self._streams = self._streams or await asyncio.open_connection(self._host, self._port)
        complete = False
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:] if line)
            if "chunked" in headers.get("transfer-encoding", ""):
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    piece = (await reader.readexactly(size + 2))[:-2]
                    if " 200 " in lines[0]:
                        yield piece
                await reader.readexactly(2)
            else:
                piece = await reader.readexactly(int(headers["content-length"]))
                if " 200 " not in lines[0]:
                    raise RuntimeError(f"{lines[0]}: {piece[:300]!r}")
                yield piece
            complete = True
        finally:
            if not complete:
                self.close()


def body(number: int, tokens: int) -> dict[str, Any]:
    """A request; each number's is another."""
    return {
        "prompt": f"{PROMPTS[number % len(PROMPTS)]} {number}",
        "max_tokens": tokens,
        "temperature": 1.0,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
        **EXTRA,
    }


async def stream(connection: Connection, number: int, tokens: int) -> Stream:
    """Runs one stream to its end."""
    began = time.perf_counter()
    times, usage, reason, held = [], None, None, b""
    async with contextlib.aclosing(
        connection.request("POST", "/v1/completions", json.dumps(body(number, tokens)).encode())
    ) as pieces:
        async for piece in pieces:
            times.append(time.perf_counter())
            *lines, held = (held + piece).split(b"\n")
            for event in events([line.decode() for line in lines]):
                usage = event.get("usage") or usage
                if event.get("choices"):
                    reason = event["choices"][0].get("finish_reason") or reason
    ended = time.perf_counter()
    if usage is None:
        raise RuntimeError("a stream ended without its usage")
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Stream((times or [ended])[0] - began, ended - began, usage["completion_tokens"], reason, gaps)


async def alone(address: str, tokens: int, number: int) -> Stream:
    """One stream with nothing beside it, on a connection that is open already."""
    connection = Connection(address)
    async for _ in connection.request("GET", "/health"):
        pass
    try:
        return await stream(connection, number, tokens)
    finally:
        connection.close()
