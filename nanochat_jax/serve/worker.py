"""The engine on a thread of its own, and the bridge between it and asyncio.

One decode thread steps the engine while there is anything to do. The event loop never waits for it: submitting and
cancelling only append to a queue or set a mark, and after every step the thread hands all new tokens to the loop in one
call. If a step fails, every open job ends with an error, the reason is logged and `healthy` turns false: the thread
never dies in silence.
"""

import asyncio
import functools
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import Event, Request
from nanochat_jax.serve.api_errors import ApiError, QueueFull, ShuttingDown, WorkerFailed
from nanochat_jax.serve.prometheus import Metrics

logger = logging.getLogger(__name__)

# Who has just got an answer is likely to ask again. Nobody gets into a call that is running, so the next one is this
# many times shorter than usual: of 32 streams without a pause between their requests, one in eight slots stood empty.
SOON = 8
STALLED_S = 300.0  # a step that takes longer is a hanging device; without a warm-up steps compile, which takes minutes


@dataclass(frozen=True)
class ServedModel:
    """What is being served: the run's name, its stage ("base", "mid", "sft", "rl"), the checkpoint's step, when it was
    saved (Unix seconds) and whether it holds conversations."""

    name: str
    stage: str
    step: int
    created: int
    chats: bool

    @property
    def fingerprint(self) -> str:
        """Which parameters answered; OpenAI's ``system_fingerprint``."""
        return f"{self.name}-step-{self.step}"


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn; see `Engine.submit`."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclass(frozen=True)
class Update:
    """New tokens of one of a job's requests, why it ended (if it did: "end", "length") and which model wrote them."""

    index: int
    tokens: Sequence[int]
    finished: str | None
    model: ServedModel


class Job:
    """The requests of one call, and their tokens as they come: ``async for update in job``. Close it when done."""

    def __init__(self, worker: "Worker", requests: Sequence[Request]):
        self.requests = list(requests)
        self.began = time.monotonic()
        self._worker = worker
        self._updates: asyncio.Queue[Update | ApiError] = asyncio.Queue()
        self._open = set(range(len(requests)))
        self._last: list[float | None] = [None] * len(requests)

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Ends when every request has; raises ApiError if the worker fails or the server stops."""
        while self._open:
            update = await self._updates.get()
            if isinstance(update, ApiError):
                raise update
            if update.index in self._open:
                if update.finished:
                    self._open.discard(update.index)
                yield update

    def cancel(self, index: int) -> None:
        """Ends one request (a stop string was met); its slot is free after the decode call that is running."""
        self._open.discard(index)
        self._worker.release(self.requests[index])

    def close(self) -> None:
        """Ends whatever still runs. Call it however the job ended."""
        for index in list(self._open):
            self.cancel(index)

    def end(self, error: ApiError) -> None:
        """Ends the iteration with an error."""
        self._updates.put_nowait(error)

    def receive(self, index: int, update: Update, metrics: Metrics) -> None:
        now, before = time.monotonic(), self._last[index]
        metrics.tokens(len(update.tokens), now - (before or self.began), first=before is None)
        self._last[index] = now
        self._updates.put_nowait(update)


class Worker:
    """Owns an engine (already warmed up).

    queue: how many requests may wait beyond those that have a slot. devices: what the engine runs on, for /stats.
    Everything but `replace` is to be called on the event loop that `start` was called on.
    """

    def __init__(self, engine: Engine, model: ServedModel, queue: int, devices: Sequence[str] = ("cpu",)):
        self.engine, self.model, self.queue, self.devices = engine, model, queue, list(devices)
        self.metrics = Metrics()
        self.metrics.watch(self)
        self.failure: BaseException | None = None
        self._jobs: dict[Request, tuple[Job, int]] = {}
        self._seconds = 1.0  # how long a request takes, smoothed
        self._wake, self._stopping, self._draining = threading.Event(), False, False
        self._pending: tuple[Any, ServedModel] | None = None
        self._beat = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    # --- state ------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return self.engine.waiting

    @property
    def running(self) -> int:
        """Requests in a slot."""
        return max(0, self.engine.live - self.engine.waiting)

    @property
    def healthy(self) -> bool:
        """False once a step has failed, or while one takes longer than `STALLED_S`."""
        stalled = self.engine.live > 0 and time.monotonic() - self._beat > STALLED_S
        return self.failure is None and self._thread.is_alive() and not stalled

    @property
    def swapping(self) -> bool:
        """Whether parameters given to `replace` are not in use yet."""
        return self._pending is not None

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._beat = time.monotonic()
        self._thread.start()

    def drain(self) -> None:
        """From now on nothing new is accepted."""
        self._draining = True

    def end_all(self, error: ApiError) -> None:
        """Ends every open job with an error."""
        for job in {id(job): job for job, _ in self._jobs.values()}.values():
            job.end(error)

    def stop(self) -> None:
        """Ends everything and the thread; waits for the step that is running, but not for ever."""
        self.drain()
        self.end_all(ShuttingDown())
        for request in list(self._jobs):
            self.release(request)
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=10)

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> Job:
        """Queues n answers to each prompt, the answers to one prompt next to each other. max_tokens is cut to what
        fits the slot.

        Raises QueueFull, WorkerFailed or ShuttingDown; ValueError as `Engine.submit` (a prompt longer than a slot).
        """
        if self._draining:
            raise ShuttingDown()
        if self.failure is not None:
            raise WorkerFailed()
        count = len(prompts) * n
        if len(self._jobs) + count > self.engine.slots + self.queue:
            self.metrics.refused()
            raise QueueFull(self._retry_after(count))
        requests: list[Request] = []
        try:
            for prompt in prompts:
                room = max(1, self.engine.capacity - len(prompt) + 1)
                for stream in range(n):
                    requests.append(
                        self.engine.submit(
                            prompt,
                            min(sampling.max_tokens, room),
                            sampling.temperature,
                            sampling.top_k,
                            sampling.seed,
                            top_p=sampling.top_p,
                            stream=stream,
                        )
                    )
        except ValueError:
            for request in requests:
                self.engine.cancel(request)
            raise
        job = Job(self, requests)
        for index, request in enumerate(requests):
            self._jobs[request] = job, index
        self._wake.set()
        return job

    def release(self, request: Request) -> None:
        """Cancels a request that nobody waits for any longer."""
        self._jobs.pop(request, None)
        self.engine.cancel(request)
        self._wake.set()  # one step more lets go of what its slot refers to

    def _retry_after(self, count: int) -> int:
        turns = (len(self._jobs) + count - self.engine.slots - self.queue) / self.engine.slots
        return max(1, min(60, math.ceil(turns * self._seconds)))

    def replace(self, params: Any, model: ServedModel) -> None:
        """New parameters, from any thread: in use as soon as no slot is busy; what waits is answered by them."""
        self._pending = params, model
        self.engine.replace_params(params)
        self._wake.set()

    # --- the decode thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.wait()
                self._wake.clear()
                going, events, soon = True, [], False
                while going and not self._stopping:
                    going = self.engine.live > 0 or self._pending is not None  # if not: once more, to free the slots
                    self._beat = time.monotonic()
                    # while the device computes the next tokens, the loop writes the last ones down
                    soon = not soon and any(e.finished for e in events) and self.engine.live < self.engine.slots
                    steps = max(1, self.engine.steps_per_call // SOON) if soon else None
                    events = self.engine.step(functools.partial(self._hand_on, events, self.model), steps)
                    if self._pending is not None and self.engine.params is self._pending[0]:
                        self.model, self._pending = self._pending[1], None
                        logger.info("now serving %s", self.model.fingerprint)
                self._hand_on(events, self.model)
        except BaseException as error:
            logger.critical("the decode thread failed; the server can answer no more requests", exc_info=error)
            self.failure = error
            self._on_loop(self._failed)

    def _hand_on(self, events: Sequence[Event], model: ServedModel) -> None:
        if events:
            self._on_loop(self._deliver, events, model)

    def _on_loop(self, function, *arguments) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: the server is gone
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, events, model: ServedModel) -> None:
        for event in sorted(events, key=lambda event: event.finished is None):  # who is done may want to go on
            entry = self._jobs.get(event.request)
            if entry is None:
                continue
            job, index = entry
            job.receive(index, Update(index, event.tokens, event.finished, model), self.metrics)
            if event.finished:
                del self._jobs[event.request]
                self._seconds += 0.1 * (time.monotonic() - job.began - self._seconds)

    def _failed(self) -> None:
        self.end_all(WorkerFailed())
        for request in list(self._jobs):
            self.release(request)
