"""The watchdog: when it is patient, when not, and what it leaves behind."""

import sys
import threading
import time
from pathlib import Path

import pytest

from nanochat_jax.training.watchdog import BUSY, FACTOR, HUNG, HungError, Watchdog
from tests import children

ROOT = Path(__file__).parents[2]


def test_limits_follow_the_median_step_and_the_kind_of_work():
    dog = Watchdog(10.0)
    assert dog.limit == 10.0 * BUSY, "the first step compiles"
    dog.step_done()
    assert dog.limit == 10.0
    dog._seconds.extend([2.0, 2.0, 100.0])
    assert dog.limit == FACTOR * 2.0
    with dog.busy():
        assert dog.limit == FACTOR * 2.0 * BUSY
    assert dog.limit == FACTOR * 2.0


def test_steps_and_long_evaluations_are_left_alone():
    ended = []
    with Watchdog(0.2, poll_s=0.02, end=ended.append) as dog:
        dog.step_done()
        for step in range(10):
            dog.step_begins(step)
            time.sleep(0.05)
            dog.step_done()
        with dog.busy():
            time.sleep(0.6)
        dog.step_done()
    assert ended == []


def test_a_waiting_main_thread_is_woken(capfd):
    with pytest.raises(HungError, match="step 7 hangs"):
        with Watchdog(0.2, poll_s=0.02) as dog:
            dog.step_done()
            dog.step_begins(7)
            threading.Event().wait(20)
    shown = capfd.readouterr().err
    assert "step 7 hangs" in shown and "--hang_timeout" in shown
    assert "test_watchdog.py" in shown and "Thread" in shown, "the stacks of all threads"


def test_zero_watches_nothing():
    before = set(threading.enumerate())  # those of earlier tests may still be ending
    with Watchdog(0.0) as dog:
        dog.step_done()
        assert not [t for t in set(threading.enumerate()) - before if t.name == "watchdog"]


def test_a_main_thread_that_cannot_be_woken_ends_the_process():
    """Held in C with the GIL released, as a hanging collective is: a signal's handler never runs."""
    code = """
import ctypes, signal, sys, threading
from nanochat_jax.training.watchdog import Watchdog
with Watchdog(0.3, grace_s=0.5, poll_s=0.05) as dog:
    dog.step_done(); dog.step_begins(3)
    libc = ctypes.CDLL(None)
    while True:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        libc.sleep(30)
"""
    began = time.monotonic()
    done = children.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == HUNG and time.monotonic() - began < 25
    assert "step 3 hangs" in done.stderr and "cannot be woken" in done.stderr and "Thread" in done.stderr
