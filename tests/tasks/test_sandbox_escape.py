"""Programs that try to get out. Each must fail to, at the kernel's word rather than Python's."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tasks.sandbox import execute_code, isolation_available

MECHANISM, WHY = isolation_available()
pytestmark = pytest.mark.skipif(MECHANISM == "none", reason=f"needs isolation: {WHY}")


@pytest.fixture(params=["auto", "user-namespaces"])
def run(request):
    """In the sandbox of this host; if that is root's, once more in that of ordinary users, where it works."""
    if request.param == "user-namespaces":
        from tasks import sandbox

        if MECHANISM == "user-namespaces" or sandbox._probe("user-namespaces"):
            pytest.skip("tested as auto, or not allowed here")
    return lambda code, *args: execute_code(code, *args, isolation=request.param)


def attempts(*expressions: str) -> str:
    """A program that prints which of these did not raise."""
    lines = ["import ctypes, os, posix, socket", "libc = ctypes.CDLL(None, use_errno=True)"]
    lines += ["def ok(r):\n    if r < 0: raise OSError(ctypes.get_errno(), 'refused')\n    return r"]
    for n, expression in enumerate(expressions):
        lines.append(f"try:\n    {expression}\n    print('succeeded:', {n}, {expression!r})\nexcept OSError: pass")
    return "\n".join([*lines, "print('tried', end='')"])


def test_network(run):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        port, name = server.getsockname()[1], f"\0sandbox{os.getpid()}"
        local.bind(name)
        local.listen()
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()
        result = run(
            attempts(
                f"socket.create_connection(('127.0.0.1', {port}), 1)",
                f"socket.create_connection(('localhost', {port}), 1)",
                f"socket.create_connection(('::1', {port}), 1)",
                "socket.create_connection(('1.1.1.1', 53), 1)",
                "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))",
                "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
                f"socket.socket(socket.AF_UNIX).connect({name!r})",
            )
        )
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert result.success and result.stdout == "tried"


def test_files_of_the_host(run, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    monkeypatch.chdir(tmp_path)
    home = Path.home() / ".bashrc"
    paths = ["secret", str(secret), "/etc/passwd", str(home), __file__, "/proc/1/environ", "/dev/sda"]
    result = run(
        attempts(
            *[f"open({path!r}).read()" for path in paths],
            *[f"open({path!r}, 'r+').write('x')" for path in paths],
            *[f"os.listdir({path!r})" for path in (str(tmp_path), "/proc", "/sys", "/var", "/run")],
            f"os.symlink({str(secret)!r}, 'link') or open('link').read()",
            f"os.symlink({str(secret)!r}, 'link2') or open('link2', 'w').write('x')",
            f"open('/tmp/../..{secret}').read()",
        )
    )
    assert result.success and result.stdout == "tried"
    assert secret.read_text() == "the secret"
    # Of the directories on the way to the standard library only the names are there.
    code = f"import os\nfor d in ('/', '/etc', '/dev', '/home', '/root', {str(Path.home())!r}):\n"
    names = set(run(code + "    print(*os.listdir(d) if os.path.isdir(d) else '')").stdout.split())
    system = {"dev", "etc", "lib", "lib64", "nix", "tmp", "usr", "ld.so.cache", "null", "zero", "random", "urandom"}
    assert "tmp" in names and names <= system | set(Path(os.__file__).parts)


def test_only_the_working_directory_is_writable(run):
    library = os.path.dirname(os.__file__)
    code = (
        "import os\nfor top, _, _ in os.walk('/'):\n    try:\n        open(top + '/x', 'w').close()\n"
        "        print(top, end=' ')\n    except OSError: pass\n    if top.count('/') > 1: _.clear()"
    )
    result = run(code, 120.0)  # a cold disk takes its time
    writable = result.stdout.split()
    assert result.success and writable[0] == "/tmp" and all(path.startswith("/tmp/") for path in writable[1:])
    result = run(attempts(*[f"open({path!r}, 'a')" for path in (os.__file__, f"{library}/x.py", "/etc/ld.so.cache")]))
    assert result.stdout == "tried"
    assert run("open('/dev/null', 'w').write('x')\nprint(len(open('/dev/urandom', 'rb').read(8)))").stdout == "8\n"


def test_system_calls(run):
    """As many as one can make with ctypes: nothing mounts, nobody becomes root, no other process is seen."""
    new_user, new_mounts, read_write = 0x10000000, 0x20000, 0x20 | 0x1000  # MS_REMOUNT | MS_BIND
    result = run(
        attempts(
            "ok(libc.setuid(0))",
            "ok(libc.setresgid(0, 0, 0))",
            f"ok(libc.unshare({new_mounts}))",
            "ok(libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, b''))",
            f"ok(libc.mount(b'', b'/', b'', {read_write}, b''))",
            "ok(libc.umount2(b'/tmp', 2))",
            "ok(libc.chroot(b'/tmp'))",
            "ok(libc.sethostname(b'x', 1))",
            "ok(libc.swapoff(b'/dev/sda'))",
            "ok(libc.reboot(0))",
            "ok(libc.setpriority(0, 0, -20))",
            "ok(libc.ptrace(16, 1, 0, 0))",  # PTRACE_ATTACH to init
            "os.mknod('disk', 0o60666, os.makedev(8, 0))",
            "posix.kill(os.getppid() + 100, 0)",
            # The rights of a user namespace of its own do not reach the mounts it did not make.
            f"ok(libc.unshare({new_user | new_mounts})) or ok(libc.mount(b'', b'/', b'', {read_write}, b''))",
            f"ok(libc.mount(b'', b'/usr/lib', b'', {read_write}, b''))",
            "ok(libc.umount2(b'/usr/lib', 2))",
            "open('/usr/lib/x', 'w')",
        )
    )
    assert result.success and result.stdout == "tried"
    result = run(
        "import ctypes, os\nbits = (ctypes.c_uint32 * 6)()\n"
        "ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), bits)\n"
        "print(list(bits), os.getuid() > 0, os.getuid() == os.geteuid(), os.getgroups() in ([], [65534]))\n"
        "print(os.getpid(), os.getppid(), ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))"
    )
    assert result.stdout == "[0, 0, 0, 0, 0, 0] True True True\n2 1 1\n"


def test_killing_everything_in_reach(run):
    """`kill(-1)` reaches the program's own process space only; init and the supervisor stay to tell."""
    mine = threading.get_native_id()
    code = f"import posix\nfor pid in (-1, 1, {os.getpid()}, {mine}, {os.getppid()}):\n    for n in (2, 9, 15):\n"
    result = run(code + "        try: posix.kill(pid, n)\n        except (OSError, KeyboardInterrupt): pass")
    assert not result.timeout


def test_fork_bomb(run, request):
    if "user-namespaces" in request.node.name and os.geteuid() == 0:
        pytest.skip("root is exempt from the limit on processes; therefore root does not use user namespaces")
    started = time.monotonic()
    result = run("import posix\nwhile True:\n    try: posix.fork()\n    except OSError: pass", 1.0)
    assert result.timeout and time.monotonic() - started < 4
    code = "import posix, time\nn = 0\ntry:\n    while True:\n        if posix.fork() == 0: time.sleep(9)\n"
    assert 8 <= int(run(code + "        n += 1\nexcept OSError: print(n)\n").stdout) <= 32


def test_thread_bomb(run, request):
    if "user-namespaces" in request.node.name and os.geteuid() == 0:
        pytest.skip("root is exempt from the limit on processes")
    code = "import _thread, time\nn = 0\ntry:\n    while True:\n        _thread.start_new_thread(time.sleep, (9,))\n"
    result = run(code + "        n += 1\nexcept RuntimeError: print(n)")
    assert result.success and 4 <= int(result.stdout) <= 32


def test_filling_the_disk(run):
    code = """
n = 0
try:
    while True:
        with open(str(n), 'wb') as file:
            file.write(bytes(1 << 20))
        n += 1
except OSError as error:
    print(n, error.errno)
"""
    result = run(code)
    assert result.success
    megabytes, error = map(int, result.stdout.split())
    assert 50 <= megabytes <= 64 and error == 28  # no space left on device
    files = "n = 0\ntry:\n    while True:\n        open(str(n), 'w').close()\n        n += 1\nexcept OSError: print(n)"
    assert 1000 < int(run(files).stdout) <= 4096
    assert "File too large" in run("f = open('x', 'wb')\nf.seek(1 << 40)\nf.write(b'x')\nf.flush()").stderr


def test_raising_the_limits(run):
    code = """
import sys
del sys.modules["resource"]
import resource
for kind in range(10):
    soft, hard = resource.getrlimit(kind)
    try:
        if hard != resource.RLIM_INFINITY:
            resource.setrlimit(kind, (hard + 1, hard + 1))
            print("raised", kind)
    except ValueError:
        pass
for name in "CPU FSIZE CORE NPROC NOFILE AS".split():
    print(name, *resource.getrlimit(getattr(resource, "RLIMIT_" + name)))
"""
    limits = {name: tuple(map(int, rest)) for name, *rest in map(str.split, run(code).stdout.splitlines())}
    assert limits == {
        "CPU": (7, 7),
        "FSIZE": (64 << 20, 64 << 20),
        "CORE": (0, 0),
        "NPROC": (32, 32),
        "NOFILE": (64, 64),
        "AS": (256 << 20, (256 + 16) << 20),
    }


def test_programs_do_not_meet(run):
    assert run("open('left', 'w').write('x')").success
    assert run("import os\nprint(os.path.exists('/tmp/left'))").stdout == "False\n"
