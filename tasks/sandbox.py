"""Run a program that a model wrote: in a fresh interpreter, locked in, killed on time.

    result = execute_code("print(1 + 1)", timeout=5.0)
    result.success, result.stdout  # (True, "2\\n")

Where Linux offers namespaces the program has its own process space, an empty network, a root directory holding the
system's and Python's libraries (read-only) and an empty 64 MiB /tmp, the only place it can write; no capabilities; a
user id of its own if we are root; limits on memory, CPU time, processes, open files and file sizes. When it ends, or at
the timeout, the kernel kills everything it started. Where there are no namespaces execution is off
(`SandboxUnavailable`), unless `allow_unsafe=True` (flag `--allow_unsafe_code`) accepts the limits (except that on
processes), killing the process group and its orphans, and a temporary directory alone: then the program has the network
and can read and write what this user can. The kernel's own attack surface is never reduced (no seccomp).

**Success** means that control reached the end of the code and the process then ended with status 0. The end is attested
by a random token (sandbox_child.py) that the program cannot guess and that no frame, object or descriptor shows: a
program which leaves early with `sys.exit(0)` or `os._exit(0)`, before its checks, has not passed. It is no proof
against code written to cheat: the program shares its interpreter with its own checks, and may as well return an object
that equals everything, or read its own memory.

Flags and stdout agree with the reference (tests/golden/exec_v1.json). On purpose, following its later version:

- `dunder_name`: the code runs as `__main__` (the reference: `builtins`), so its main block runs;
- `exception_after_print`, `sys_exit_zero`: stdout and stderr are returned on failure too;
- `memory_limit_none`: no limit means no limit (the reference crashes and calls it a timeout).

and the text of `error` is the last line of stderr, so it differs where the reference's is not a traceback's last line.
Unlike that later version, status 0 alone is not success. Set iteration order is the same in every run (hash seed 0),
and site-packages are not on the path.
"""

import functools
import os
import py_compile
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.utils.errors import InputError, UserError

MEMORY_BYTES = 256 << 20
OUTPUT_BYTES = 1 << 20  # saved of stdout and of stderr; the rest is read and dropped
ROOT, USER, NONE = "root-namespaces", "user-namespaces", "none"

_CHILD = Path(__file__).with_name("sandbox_child.py")
# -P -s -S: nothing but the standard library; -B: no bytecode files.
_PYTHON_FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")
# One malloc arena: each thread's own would reserve 64 MiB of the memory limit.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
_GRACE_SECONDS = 30.0  # beyond the timeout, for starting up on a busy machine


class SandboxUnavailable(UserError, RuntimeError):
    """This host cannot isolate a program, and running it without isolation was not asked for."""


@dataclass
class ExecutionResult:
    """How a program ended. `error` is None on success, otherwise one line."""

    success: bool
    stdout: str
    stderr: str
    error: str | None = None
    timeout: bool = False
    memory_exceeded: bool = False

    def __repr__(self) -> str:
        parts = [f"success={self.success}"]
        for name in ("timeout", "memory_exceeded", "error", "stdout", "stderr"):
            if value := getattr(self, name):
                parts.append(f"{name}={value!r}")
        return f"ExecutionResult({', '.join(parts)})"


def execute_code(
    code: str,
    timeout: float = 5.0,
    maximum_memory_bytes: int | None = MEMORY_BYTES,
    *,
    isolation: str = "auto",
    allow_unsafe: bool = False,
) -> ExecutionResult:
    """Run `code` as `__main__` and say how it ended. Safe to call from any thread.

    timeout: seconds of wall clock, from the program's start. maximum_memory_bytes: of address space per process; None:
    no limit. isolation: "auto", or "root-namespaces", "user-namespaces", "none" to insist on one.
    Raises SandboxUnavailable where the program cannot be isolated and `allow_unsafe` is False.
    """
    if timeout <= 0:
        raise InputError(f"timeout must be above 0 seconds, got {timeout}")
    mechanism = _choose(isolation, allow_unsafe)
    outcome, status, stdout, stderr = _run_child(code, timeout, maximum_memory_bytes or 0, mechanism)
    if outcome == "unavailable":  # it worked when probed
        raise SandboxUnavailable(f"cannot start the sandbox: {status}")
    success, timed_out = outcome == "done", outcome == "timeout"
    lines = stderr.strip().splitlines()
    last_line = lines[-1].strip() if lines else ""
    return ExecutionResult(
        success=success,
        stdout=stdout,
        stderr=stderr,
        error=None if success else _error(outcome, status, last_line),
        timeout=timed_out,
        memory_exceeded=not success and not timed_out and last_line.split(":")[0] == "MemoryError",
    )


@functools.lru_cache(maxsize=1)
def isolation_available() -> tuple[str, str]:
    """(mechanism, why): how programs are isolated on this host. Tried once by running one, then remembered.

    The mechanism is "root-namespaces" (we may make namespaces directly), "user-namespaces" (as any user) or "none".
    """
    if sys.platform != "linux":
        return NONE, f"namespaces need Linux, this is {sys.platform}"
    mechanism = ROOT if os.geteuid() == 0 else USER
    reason = _probe(mechanism)
    if reason:
        return NONE, reason
    return mechanism, "own process space, no network, private read-only root, no privileges"


def _probe(mechanism: str) -> str:
    """Why this mechanism does not work here; empty if it does."""
    look = "import os, hashlib; print(os.path.exists('/tmp'), os.path.exists('/proc'), os.getpid(), os.geteuid() > 0)"
    outcome, status, stdout, stderr = _run_child(look, 20.0, MEMORY_BYTES, mechanism)
    if outcome == "unavailable":
        hint = ""
        if "ermi" in status:  # permission denied, operation not permitted
            hint = "; a container needs the capability SYS_ADMIN, Ubuntu kernel.apparmor_restrict_unprivileged_userns=0"
        return f"this host refuses namespaces ({status}{hint})"
    if outcome != "done" or stdout != "True False 2 True\n":
        return f"a test program did not run: {outcome} {status} {stdout.strip()} {stderr.strip()[-200:]}"
    return ""


@functools.lru_cache(maxsize=1)
def _child_script() -> str:
    """The child's bytecode, since Python keeps none for a script and compiling it takes 4 ms; else its source."""
    try:
        return py_compile.compile(str(_CHILD), doraise=True) or str(_CHILD)
    except OSError:  # an installation that this user cannot write to
        return str(_CHILD)


def _choose(isolation: str, allow_unsafe: bool) -> str:
    if isolation not in ("auto", ROOT, USER, NONE):
        raise InputError(f"isolation must be auto, {ROOT}, {USER} or {NONE}, got {isolation!r}")
    if isolation in (ROOT, USER):
        return isolation
    mechanism, reason = isolation_available() if isolation == "auto" else (NONE, "isolation was switched off")
    if mechanism == NONE and not allow_unsafe:
        raise SandboxUnavailable(
            f"execution of generated code is off: {reason}. --allow_unsafe_code (allow_unsafe=True) runs it with "
            "resource limits only: it can then reach the network and every file that you can"
        )
    return mechanism


def _run_child(code: str, timeout: float, memory: int, mechanism: str) -> tuple[str, str, str, str]:
    """Start the child and wait for it: (outcome, exit status or reason, stdout, stderr)."""
    directory = tempfile.mkdtemp(prefix="sandbox_") if mechanism == NONE else "/"
    verdict_fd, child_verdict_fd = os.pipe()
    try:
        command = [
            sys.executable,
            *_PYTHON_FLAGS,
            _child_script(),
            mechanism,
            str(timeout),
            str(memory),
            str(child_verdict_fd),
        ]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=directory,
                env=_ENVIRONMENT,
                pass_fds=(child_verdict_fd,),
                start_new_session=True,
            )
        finally:
            os.close(child_verdict_fd)
        with process:
            try:
                return _converse(process, verdict_fd, code, timeout)
            finally:
                _kill_group(process)
    finally:
        os.close(verdict_fd)
        if mechanism == NONE:
            _remove_tree(directory)


def _converse(process: subprocess.Popen, verdict_fd: int, code: str, timeout: float) -> tuple[str, str, str, str]:
    assert process.stdin and process.stdout and process.stderr
    try:
        process.stdin.write(code.encode(errors="replace"))  # the child reads all of it first, so this cannot block
        process.stdin.close()
    except BrokenPipeError:
        pass
    outputs = {process.stdout.fileno(): _Output(), process.stderr.fileno(): _Output()}
    deadline = time.monotonic() + timeout + _GRACE_SECONDS
    verdict = b""
    with selectors.DefaultSelector() as selector:
        for fd in (verdict_fd, *outputs):
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ)
        finished = False
        while not finished and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fd == verdict_fd:
                    verdict, finished = os.read(verdict_fd, 4096), True
                elif not outputs[key.fd].read_from(key.fd):
                    selector.unregister(key.fd)
    for fd, output in outputs.items():  # what is still in the pipes, at most their capacity
        output.read_from(fd, rest=True)
    outcome, _, status = verdict.decode(errors="replace").partition(" ")
    texts = [output.text() for output in outputs.values()]
    return outcome or "lost", status, texts[0], texts[1]


class _Output:
    """A stream's first OUTPUT_BYTES, and how many there were."""

    def __init__(self) -> None:
        self.saved = bytearray()
        self.total = 0

    def read_from(self, fd: int, rest: bool = False) -> bool:
        """Take what is there (rest: up to what a pipe can hold). False at the end of the stream."""
        for _ in range(16 if rest else 1):
            try:
                part = os.read(fd, 1 << 16)
            except BlockingIOError:
                return True
            if not part:
                return False
            self.total += len(part)
            self.saved += part[: OUTPUT_BYTES - len(self.saved)]
        return True

    def text(self) -> str:
        text = self.saved.decode(errors="replace")
        return text if self.total <= OUTPUT_BYTES else f"{text}\n[truncated: {self.total:,} bytes written]\n"


def _error(outcome: str, status: str, last_line: str) -> str:
    if outcome == "timeout":
        return "Execution timed out (process killed)"
    if outcome == "lost":
        return "Execution failed (the sandbox gave no verdict)"
    if int(status) > 128:
        try:
            return f"Killed by {signal.Signals(int(status) - 128).name}"
        except ValueError:
            pass
    if int(status) == 0:
        return "Ended with status 0 before the end of the code"
    return last_line or f"Execution failed (exit status {status})"


def _kill_group(process: subprocess.Popen) -> None:
    """The child normally has ended. If not (no verdict in time, Ctrl-C), its death takes init and all else with it."""
    if process.poll() is None:
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _remove_tree(directory: str) -> None:
    """Remove a directory whatever permissions the program gave to those in it."""
    os.chmod(directory, 0o700)
    for parent, names, _ in os.walk(directory):  # top down: each is opened before it is entered
        for path in (os.path.join(parent, name) for name in names):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(directory, ignore_errors=True)
