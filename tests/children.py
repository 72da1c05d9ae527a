"""Processes that tests start: each is in a group of its own and ends with its test, whatever happens.

The fixture `children_end_with_their_test` is in use for every test. If pytest itself is killed, a keeper process sees
its pipe close and kills the groups that are left. Tests use `start` and `run` in place of `subprocess.Popen` and
`subprocess.run`.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

# Reads "+group" and "-group" lines; at the end of its input it kills the groups that are still there.
KEEPER = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""

_living: dict[int, subprocess.Popen] = {}  # by group


@functools.cache
def _keeper() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", KEEPER], stdin=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
    )


def _tell_keeper(line: str) -> None:
    pipe = _keeper().stdin
    assert pipe is not None
    pipe.write(f"{line}\n")


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """`subprocess.Popen(command, **options)` in a process group of its own, killed at the end of the test."""
    if not options.get("start_new_session"):
        options["process_group"] = 0
    _keeper()  # first: nothing may stand between the start and its registration
    process = subprocess.Popen(command, **options)
    _living[process.pid] = process
    _tell_keeper(f"+{process.pid}")
    return process


def run(command: list[str], timeout: float = 300, check: bool = False, **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run` that waits `timeout` seconds at most and leaves no process of the group behind."""
    if options.pop("capture_output", False):
        options |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = start(command, **options)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        end([process.pid])
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def living() -> set[int]:
    """The groups that were started and not ended."""
    return set(_living)


def end(groups: Iterable[int]) -> None:
    """Kills these groups, their leaders' children included, and waits for the leaders."""
    for group in groups:
        process = _living.pop(group)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone; macOS: all zombies
            os.killpg(group, signal.SIGKILL)
        process.wait()
        _tell_keeper(f"-{group}")


@pytest.fixture(autouse=True)
def children_end_with_their_test():
    """Kills the processes that a test started and did not end (those of fixtures that outlive it stay)."""
    older = living()
    yield
    end(living() - older)


def pytest_sessionfinish() -> None:
    end(living())
