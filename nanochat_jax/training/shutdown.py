"""Ctrl-C and SIGTERM: what is asked for, and when it is done.

Inside the training loop a signal is kept until the step is finished, so that its numbers can be saved. While nothing is
under way that needs finishing (rows are being made, text is being fetched), it ends the wait at once.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nanochat_jax.parallel import multihost


class Interrupted(BaseException):
    """Raised in the main thread by a signal that ends a wait; its text is the signal's name."""


class Stop:
    """The signal that asked to stop, as `name`; "" as long as none has come."""

    def __init__(self):
        self.name = ""
        self._waiting = False

    def request(self, number: int, frame: object = None) -> None:
        """Handles a signal. The second Ctrl-C raises KeyboardInterrupt: it stops at once."""
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if multihost.several():
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._waiting:
            raise Interrupted(self.name)

    @contextmanager
    def ends_this(self) -> Iterator[None]:
        """Around a wait that a signal, also one that has come already, may end with Interrupted. Not where there are
        several processes: those stop together, at a step."""
        self._waiting = True
        try:
            if self.name and not multihost.several():
                raise Interrupted(self.name)
            yield
        finally:
            self._waiting = False


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Takes SIGTERM and Ctrl-C meanwhile; what was done about them before is done again afterwards.

    With several processes, JAX listens to SIGTERM and brings all of them to the same step; Ctrl-C is sent on to it.
    """
    stop = Stop()
    with _handling((signal.SIGINT,) if multihost.several() else (signal.SIGINT, signal.SIGTERM), stop.request):
        yield stop


@contextmanager
def signals_raise() -> Iterator[None]:
    """The first SIGTERM or Ctrl-C raises Interrupted meanwhile: for what comes before and after training. The second
    Ctrl-C raises KeyboardInterrupt."""
    asked = False

    def request(number: int, frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            asked = True
            raise Interrupted(signal.Signals(number).name)

    with _handling((signal.SIGINT, signal.SIGTERM), request):
        yield


@contextmanager
def _handling(numbers: tuple[int, ...], handler: Callable) -> Iterator[None]:
    previous = {}
    try:
        for number in numbers:
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: signals are the caller's business
        pass
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
