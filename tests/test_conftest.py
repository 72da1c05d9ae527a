"""The guards of conftest.py, skips.py and children.py themselves."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests import children, skips

ROOT = Path(__file__).parents[1]


def test_eight_devices_and_strict_ranks():
    assert jax.device_count() == 8 and jax.default_backend() == "cpu"
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))


def test_the_network_is_closed():
    with pytest.raises(OSError, match="may not use the network"):
        socket.create_connection(("example.com", 80), timeout=1)
    for address in (("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0)):
        family = socket.AF_INET if len(address) == 2 else socket.AF_INET6
        with socket.socket(family) as s, pytest.raises(OSError, match="may not use the network"):
            s.connect(address)
        with socket.socket(family) as s, pytest.raises(OSError, match="may not use the network"):
            s.connect_ex(address)
    with socket.socket() as server, socket.socket() as client:  # but for this machine
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(("localhost", server.getsockname()[1]))


# --- skips ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pytest_in(tmp_path_factory):
    """Runs pytest with skips.py and children.py, not conftest.py, on the source of a test module: (code, output)."""

    def run(source: str, *flags: str) -> tuple[int, str]:
        folder = tmp_path_factory.mktemp("inner")
        (folder / "test_inner.py").write_text(source)
        plugins = ("xdist.plugin", "tests.skips", "tests.children", "no:cacheprovider")
        command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={folder}", str(folder), *flags]
        command += [word for plugin in plugins for word in ("-p", plugin)]
        env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the plugins of libraries take seconds to load
        done = children.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


# a None in sys.modules makes the import fail as if the module were not there
SKIPPING = """
import pytest, sys

def test_that_wants_a_browser():
    pytest.skip("no browser")

@pytest.mark.skipif(True, reason="this jaxlib comes without its header")
def test_that_wants_a_header():
    pass

@pytest.mark.xfail(reason="known")
def test_that_is_known_to_fail():
    assert False

def test_that_trains_a_tokenizer():
    sys.modules["rustbpe"] = None
    from nanochat_jax.text.tokenizer import Tokenizer
    Tokenizer.train(["some text"], 300)

def test_that_passes():
    pass
"""


def test_skips_are_told_in_one_line_and_forbidden_on_demand(pytest_in):
    code, output = pytest_in(SKIPPING, "-n", "1")
    assert code == 0 and "1 passed, 3 skipped, 1 xfailed" in output
    (line,) = [line for line in output.splitlines() if line.startswith("skipped: ")]
    for reason in ("no browser", "this jaxlib comes without its header", skips.NOT_BUILT):
        assert f"1 x {reason}" in line
    code, output = pytest_in(SKIPPING, "--no-skips")
    assert code == 1 and "2 failed, 1 passed, 1 skipped, 1 xfailed" in output
    code, output = pytest_in("import pytest\npytest.importorskip('no_such_module')", "--no-skips")
    assert code == pytest.ExitCode.INTERRUPTED and "no_such_module" in output  # a module skipped as a whole


def test_a_reason_must_be_true_of_this_machine(monkeypatch):
    monkeypatch.setattr(skips, "LEGITIMATE", [("needs a GPU", lambda: False), ("needs Linux", lambda: True)])
    assert not skips.is_legitimate("needs a GPU") and skips.is_legitimate("needs Linux: reads /proc")


# --- children ---------------------------------------------------------------------------------------------------------

FAMILY = f"{sys.executable} -c 'import time; time.sleep(600)' & echo $! ; wait"
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc")


def ends(pid: int, seconds: float = 30) -> bool:
    """Whether the process ends in time (it may be left as a zombie)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


@needs_proc
def test_a_child_and_its_children_end_with_the_test(pytest_in, tmp_path):
    source = f"""
import subprocess
from tests import children

def test_that_leaves_a_family():
    process = children.start(["bash", "-c", {FAMILY!r}], stdout=subprocess.PIPE, text=True)
    open({str(tmp_path / "pids")!r}, "w").write(f"{{process.pid}} {{process.stdout.readline()}}")
    assert False
"""
    code, output = pytest_in(source)
    assert code == 1 and "1 failed" in output
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and all(ends(pid) for pid in pids)


@needs_proc
def test_children_end_when_pytest_is_killed():
    code = f"""
import os, signal, subprocess
from tests import children
process = children.start(["bash", "-c", {FAMILY!r}], stdout=subprocess.PIPE, text=True)
print(process.pid, process.stdout.readline(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = children.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(pids) == 2 and all(ends(pid) for pid in pids)


def test_a_program_that_takes_too_long_is_killed():
    before = children.living()
    with pytest.raises(subprocess.TimeoutExpired):
        children.run([sys.executable, "-c", "import time; time.sleep(600)"], timeout=0.5)
    assert children.living() == before


def test_processes_are_started_through_children_only():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        calls = [f"subprocess.{name}(" for name in ("run", "Popen", "call", "check_call", "check_output")]
        if path.name not in ("children.py", "test_conftest.py"):
            assert not [call for call in calls if call in path.read_text("utf-8")], path
