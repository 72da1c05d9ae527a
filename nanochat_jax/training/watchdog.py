"""A thread that notices when a run hangs: it prints where every thread stands and ends the process."""

import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from nanochat_jax.utils.errors import UserError

HUNG = 4  # exit code
FACTOR = 20.0  # a step may always take this many times the median
BUSY = 10.0  # compiling, evaluating, sampling may take this many times the limit of a step
GRACE_S = 60.0  # for the main thread to save, if it can be woken


class HungError(UserError, RuntimeError):
    """Raised in the main thread when it is woken from a wait that took too long."""


class Watchdog:
    """Call `step_done` after every step; use `busy` around what is no step. A context manager.

    A step may take `limit_s` seconds, or FACTOR times the median step if that is longer; 0 watches nothing. When it
    takes longer, all stacks go to stderr, and HungError is raised in the main thread where that waits in Python (for
    data, a lock, a file), so that it can still save. After GRACE_S the process ends with status HUNG in any case.
    `noted` is called with the step and the seconds it waited, in a thread.
    """

    def __init__(
        self,
        limit_s: float,
        grace_s: float = GRACE_S,
        poll_s: float = 1.0,
        end: Callable[[int], object] = os._exit,
        noted: Callable[[int, float], object] = lambda step, waited: None,
    ):
        self._noted = noted
        self.limit_s, self._grace_s, self._poll_s, self._end = limit_s, grace_s, min(poll_s, max(limit_s, 0.01)), end
        self._seconds: deque[float] = deque(maxlen=50)
        self._since = time.monotonic()
        self._busy = 1  # until the first step
        self._step = 0
        self._stop = threading.Event()
        self._previous = None
        self._main = threading.main_thread().ident
        self._wakes = False

    @property
    def limit(self) -> float:
        """Seconds that the present piece of work may take."""
        limit = max(self.limit_s, FACTOR * statistics.median(self._seconds)) if self._seconds else self.limit_s
        return limit * BUSY if self._busy else limit

    def step_begins(self, step: int) -> None:
        self._step, self._since = step, time.monotonic()

    def step_done(self) -> None:
        """A step's numbers are there."""
        now = time.monotonic()
        if not self._busy:
            self._seconds.append(now - self._since)
        self._busy, self._since = 0, now

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While compiling, evaluating, sampling: more time is given."""
        self._busy, before = 1, self._busy
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._busy, self._since = before, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.limit_s > 0:
            try:
                self._previous = signal.signal(signal.SIGUSR1, self._wake)
                self._wakes = True
            except ValueError:  # not the main thread: it cannot be woken
                pass
            self._since = time.monotonic()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._wakes:
            signal.signal(signal.SIGUSR1, self._previous)

    def _wake(self, number, frame) -> None:
        raise HungError(f"step {self._step} hangs")

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_s):
            waited, limit = time.monotonic() - self._since, self.limit
            if waited > limit:
                break
        else:
            return
        median = f" (the median step took {statistics.median(self._seconds):.1f} s)" if self._seconds else ""
        print(
            f"error: step {self._step} hangs: nothing has happened for {waited:.0f} s{median}; the limit is "
            f"{limit:.0f} s (--hang_timeout). Where every thread stands:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        with suppress(Exception):  # a full disk, for instance: the process has to end all the same
            self._noted(self._step, waited)
        if self._wakes and self._main is not None:
            signal.pthread_kill(self._main, signal.SIGUSR1)
            if self._stop.wait(self._grace_s):
                return
        print(
            "error: the main thread cannot be woken, so nothing more is saved. The same command resumes from the last "
            "checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        self._end(HUNG)
