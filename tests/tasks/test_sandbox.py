"""Running generated code: the reference's answers, what success means, limits, cleaning up, and being switched off."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks import sandbox
from tasks.sandbox import ExecutionResult, SandboxUnavailable, execute_code, isolation_available
from tests import children
from tests.tokenizer_fixtures import golden

ROOT = Path(__file__).parents[2]
MECHANISM, WHY = isolation_available()


@pytest.fixture(params=["isolated", "unsafe"])
def run(request):
    """`execute_code` as this host isolates it, and without isolation."""
    if request.param == "unsafe":
        return lambda code, *args: execute_code(code, *args, isolation="none", allow_unsafe=True)
    if MECHANISM == "none":
        pytest.skip(f"needs isolation: {WHY}")
    return execute_code


def test_same_answers_as_the_reference(run):
    """But for what the docstring of sandbox.py lists: output is kept where a program fails, too; code runs as
    `__main__`, there as `builtins`; without a limit of memory the reference's child crashes."""
    programs = golden("exec_v1")["programs"]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda p: run(p["code"], p["timeout"], p["maximum_memory_bytes"]), programs))
    for program, result in zip(programs, results, strict=True):
        want = program["result"]
        assert (result.error is None) == result.success
        if program["maximum_memory_bytes"] is None:
            assert result.success, program["name"]
            continue
        for key in ("success", "timeout", "memory_exceeded"):
            assert getattr(result, key) == want[key], program["name"]
        if want["success"] and "__name__" not in program["code"]:
            assert (result.stdout, result.stderr) == (want["stdout"], want["stderr"]), program["name"]


def test_error_is_the_last_line_of_the_traceback(run):
    result = run("print('before')\nraise ValueError('after the print')")
    assert result.error == "ValueError: after the print" and result.stdout == "before\n"
    assert result.stderr.splitlines()[1] == '  File "<llm>", line 2, in <module>'
    assert run("print(__name__)").stdout == "__main__\n"


def test_repr_of_the_reference():
    for case in golden("exec_v1")["result_repr"]:
        assert repr(ExecutionResult(**case["fields"])) == case["repr"]


# Success: the end of the code was reached.

NOT_THE_END = {
    "exit status 0": "import os\nos._exit(0)",
    "SystemExit": "raise SystemExit",
    "sys.exit in a function": "import sys\ndef f(): sys.exit(0)\nf()",
    "builtins replaced": "import builtins, sys\nbuiltins.exec = builtins.compile = builtins.__import__ = None\n"
    "sys.exit = sys.excepthook = sys.__excepthook__ = lambda *a: None\nassert False",
    "exit status 0 from a hook": "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\nassert False",
    "exit status 0 at exit": "import atexit, os\natexit.register(os._exit, 0)\nassert False",
    "fake write": "import os, posix\nposix.write = os.write = lambda fd, data: len(data)\nassert False",
    "failure at exit": "import atexit, os\natexit.register(os._exit, 1)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**8)\ndef f(): return f()\nf()",
    "deep recursion in C": "import sys\nsys.setrecursionlimit(10**8)\nx = ()\nfor _ in range(10**6): x = (x,)\nhash(x)",
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "forked, both come to the end": "import posix\npid = posix.fork()\nif pid: posix.waitpid(pid, 0)",
    "no Python": "\0",
}


@pytest.mark.parametrize("name", NOT_THE_END)
def test_only_reaching_the_end_is_success(run, name):
    result = run(NOT_THE_END[name], 60.0, 96 << 20 if "in C" in name else 48 << 20)
    assert not result.success and not result.timeout and result.error


# Looks at everything that frames, `gc` and descriptors show, tells it, and answers with it on every descriptor.
FORGER = """
import gc, os, posix, sys
gc.unfreeze()
seen, todo, candidates = {}, [sys._current_frames(), gc.get_objects(), sys.modules], set()
frame = sys._getframe()
while frame:
    todo += [frame, frame.f_locals, frame.f_globals, frame.f_code.co_consts, gc.get_referents(frame)]
    frame = frame.f_back
while todo:
    thing = todo.pop()
    if id(thing) not in seen:
        seen[id(thing)] = thing
        todo += gc.get_referents(thing)
for thing in seen.values():
    if type(thing) in (bytes, bytearray):
        candidates.add(bytes(thing))
for fd in range(3, 64):
    try:
        os.fstat(fd)
        os.set_blocking(fd, False)
        candidates.add(os.read(fd, 100))
    except OSError:
        pass
print("the code itself is found:", any(b"while todo:" in thing for thing in candidates))
print(*[thing.hex() for thing in candidates if len(thing) == 32], flush=True)
for fd in range(3, 64):
    for candidate in ANSWER:
        try:
            posix.write(fd, candidate)
        except OSError:
            break
posix._exit(0)
"""


@pytest.fixture
def patched_child(monkeypatch, tmp_path):
    """patched_child(old, new, ...): the child with its source changed so, for the rest of the test."""
    source = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    before = "    posix.set_blocking(report_out"
    tell = (before, "    posix.write(2, token.hex().encode())\n" + before)  # once the program is dead

    def patch(*changes):
        text = source
        for old, new in (*changes, tell):
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "child.py").write_text(text)
        monkeypatch.setattr(sandbox, "_child_script", lambda: str(tmp_path / "child.py"))

    return patch


@pytest.mark.parametrize("answer", ["candidates", "[bytes(32)]"])
def test_the_token_cannot_be_found(run, patched_child, answer):
    patched_child()
    result = run(FORGER.replace("ANSWER", answer))
    assert "the code itself is found: True" in result.stdout, result  # so the search does search
    assert not result.success and result.error != "Execution failed"
    token = result.stderr
    assert len(token) == 64 and token not in result.stdout


def test_a_token_in_a_variable_would_be_found(run, patched_child):
    """The test above can fail: a child that keeps the token in a local variable tells it, and takes the forged end."""
    patched_child(
        ("posix.read(token_fd, _TOKEN_BYTES) + (", "secret + ("),
        ("        code = compile(", "        secret = posix.read(token_fd, _TOKEN_BYTES)\n        code = compile("),
    )
    result = run(FORGER.replace("ANSWER", "[sys._getframe(1).f_locals['secret']]"))
    assert result.success and result.stderr in result.stdout


OPEN_DESCRIPTORS = """
import os
OPEN = []
for fd in range(3, 64):
    try:
        os.fstat(fd)
        OPEN.append(fd)
    except OSError:
        pass
"""


def test_only_one_descriptor_besides_the_streams(run):
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        result = run(OPEN_DESCRIPTORS + "print(len(OPEN))")
    finally:
        os.close(reader)
        os.close(writer)
    assert result.stdout == "1\n"


@pytest.mark.parametrize("action", ["os.close(fd)", "os.dup2(null, fd)"])
def test_closing_or_overwriting_every_descriptor(run, action):
    code = (
        "import os\nnull = os.open('/dev/null', os.O_RDWR)\nfor fd in range(21):\n    try: %s\n    except OSError: pass"
    )
    result = run(code % action)
    assert not result.success and not result.timeout


# Limits.


def test_output_is_bounded_and_never_blocks():
    started = time.monotonic()
    code = "import sys\nfor _ in range(128): sys.stdout.write('x' * 2**20)\nsys.stderr.write('y' * 2**21)\n"
    result = execute_code(code + "print('end')", 20.0, allow_unsafe=True)
    assert result.success and time.monotonic() - started < 15
    assert result.stdout == "x" * 2**20 + f"\n[truncated: {2**27 + 4:,} bytes written]\n"
    assert result.stderr == "y" * 2**20 + f"\n[truncated: {2**21:,} bytes written]\n"


def test_unfinished_output_is_kept_at_the_timeout(run):
    result = run("print('so far', flush=True)\nwhile True: pass", 0.5)
    assert result.timeout and result.stdout == "so far\n"


def test_ignoring_signals_does_not_help(run):
    code = "import signal\nfor n in range(1, 64):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    code += "    except (OSError, ValueError): pass\n"
    started = time.monotonic()
    result = run(code + "signal.alarm(0)\nsignal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass", 0.5)
    assert result.timeout and result.error == "Execution timed out (process killed)"
    assert time.monotonic() - started < 3


def test_a_thread_that_never_ends(run):
    result = run("import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()", 0.5)
    assert result.timeout and not result.success


def test_cpu_time_of_a_stopped_clock(run):
    assert not run("import os, signal\nimport posix\nposix.kill(os.getpid(), signal.SIGSTOP)", 0.5).success


def test_memory_used_up_by_small_objects(run):
    result = run("import itertools\nkeep = [[n] for n in itertools.count()]", 10.0, 64 << 20)
    assert result.memory_exceeded and result.error == "MemoryError"


def test_environment_is_scrubbed(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    result = run("import os, sys\nprint(sorted(os.environ), sys.argv, sys.flags.hash_randomization)")
    assert result.stdout == "['LC_ALL', 'MALLOC_ARENA_MAX', 'PATH', 'PYTHONHASHSEED'] [''] 0\n"


def test_a_long_program_and_odd_text(run):
    result = run("x = '''" + "ü" * 300_000 + "'''\nprint(len(x))")
    assert result.stdout == "300000\n"
    assert run("print(len('\ud800'))").success  # half a character, as a model may write


def test_directory_is_private_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, posix\nos.makedirs('a/b/c')\nopen('a/b/f', 'w').close()\nos.symlink('/', 'a/b/root')\n"
        "for d in ('a/b/c', 'a/b', 'a', '.'): posix.chmod(d, 0)\nprint('made')"
    )
    assert execute_code(code, isolation="none", allow_unsafe=True).stdout == "made\n"
    assert list(tmp_path.iterdir()) == []


# Nothing survives.

NAME = "import ctypes\nctypes.CDLL(None).prctl(15, b'%s', 0, 0, 0)\n"  # how /proc/*/comm shows the process


def named(name: str) -> int:
    """How many processes of the host bear this name."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += path.read_text().strip() == name
        except OSError:
            pass
    return found


DAEMON = (
    "import os, posix, signal, time\nif posix.fork() == 0:\n    os.setsid()\n    if posix.fork() == 0:\n"
    "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n        time.sleep(60)\n    posix._exit(0)\n"
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc")
@pytest.mark.parametrize("end", ["", "time.sleep(60)\n", "posix._exit(1)\n"])
def test_daemons_die_with_the_program(run, end):
    name = f"dmn{os.getpid()}x{len(end)}"
    code = NAME % name + DAEMON + "time.sleep(0.4)\n" + end
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, code, 1.0 if "sleep" in end else 10.0)
        most = 0
        while not future.done():
            most = max(most, named(name))
            time.sleep(0.02)
    assert most >= 2, future.result()  # they were there
    assert named(name) == 0
    assert future.result().timeout == (end == "time.sleep(60)\n")
    assert future.result().success == (end == "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc")
def test_nothing_outlives_this_process(run, request, tmp_path):
    """`kill -9` of the process that runs programs takes the programs with it."""
    isolation = "none" if "unsafe" in request.node.name else "auto"
    name = f"out{os.getpid()}"
    code = f"{NAME % name}import time\ntime.sleep(60)"
    call = f"from tasks.sandbox import *\nexecute_code({code!r}, 60.0, isolation={isolation!r}, allow_unsafe=True)"
    process = children.start([sys.executable, "-c", call], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
    wait_for(lambda: named(name) > 0)
    process.kill()
    wait_for(lambda: named(name) == 0)


def wait_for(condition, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_off_where_nothing_isolates(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation_available", lambda: ("none", "namespaces are refused"))
    for call in (lambda: execute_code("1"), lambda: execute_code("1", isolation="none")):
        with pytest.raises(SandboxUnavailable, match="--allow_unsafe_code"):
            call()
    with pytest.raises(SandboxUnavailable, match="namespaces are refused"):
        execute_code("1")
    assert execute_code("print(1)", allow_unsafe=True).stdout == "1\n"


def test_the_probe_says_why(monkeypatch):
    assert isolation_available() is isolation_available()  # once
    monkeypatch.setattr(sandbox, "_run_child", lambda *_: ("unavailable", "unshare: Operation not permitted", "", ""))
    mechanism, why = isolation_available.__wrapped__()
    assert mechanism == "none" and "unshare: Operation not permitted; a container needs" in why
    monkeypatch.setattr(sandbox, "_run_child", lambda *_: ("done", "0", "True True 4711 False\n", ""))
    mechanism, why = isolation_available.__wrapped__()  # an "isolation" that isolates nothing
    assert mechanism == "none" and "did not run" in why


def test_a_namespace_that_fails_later_is_no_execution(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation_available", lambda: ("user-namespaces", "it worked"))
    monkeypatch.setattr(sandbox, "_run_child", lambda *_: ("unavailable", "mount: Permission denied", "", ""))
    with pytest.raises(SandboxUnavailable, match="mount: Permission denied"):
        execute_code("1", allow_unsafe=True)


@pytest.mark.parametrize("name, value", [("timeout", 0.0), ("isolation", "docker")])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=name):
        execute_code("1", **{name: value})


def test_from_a_thread_and_without_jax():
    results = []
    thread = threading.Thread(target=lambda: results.append(execute_code("print(2)", allow_unsafe=True)))
    thread.start()
    thread.join()
    assert results[0].stdout == "2\n"
    code = "import sys, tasks.sandbox\nprint('jax' in sys.modules, 'numpy' in sys.modules)"
    output = children.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert output == "False False\n"
