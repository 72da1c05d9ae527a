"""Every test runs on eight simulated devices, with strict shapes and without a network."""

import os
import signal
import socket
from pathlib import Path

import pytest

# hooks and a fixture that pytest finds here
from tests.children import children_end_with_their_test, pytest_sessionfinish  # noqa: F401
from tests.skips import pytest_addoption, pytest_configure  # noqa: F401

# Before JAX starts: the number of CPU devices cannot be changed afterwards, and a GPU would change the arithmetic.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell starts what it puts into the background with Ctrl-C ignored, and every child inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"

_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex
_getaddrinfo = socket.getaddrinfo


def _is_local(address) -> bool:
    if not isinstance(address, tuple):  # a Unix socket path
        return True
    host = address[0].decode() if isinstance(address[0], bytes) else str(address[0])
    return host in ("", "localhost", "::1", "0.0.0.0", "::") or host.startswith("127.")


def _refuse(address):
    raise OSError(f"tests may not use the network (tried {address!r}); copy what the test needs into tests/golden")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Only loopback connections: a test that needs the internet fails here instead of on someone else's machine."""

    def connect(self, address):
        return _connect(self, address) if _is_local(address) else _refuse(address)

    def connect_ex(self, address):
        return _connect_ex(self, address) if _is_local(address) else _refuse(address)

    def getaddrinfo(host, *args, **kwargs):
        return _getaddrinfo(host, *args, **kwargs) if host is None or _is_local((host,)) else _refuse(host)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(socket.socket, "connect_ex", connect_ex)
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture(autouse=True, scope="session")
def compile_cache(tmp_path_factory) -> Path:
    """One folder for what the tests compile: the workers and the processes that tests start find it there again."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compile_cache"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with the numbers produced by the reference system."""
    return GOLDEN


@pytest.fixture(scope="module")
def optimized():
    """Programs are compiled as users have them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """An empty base directory."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path
