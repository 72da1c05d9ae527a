"""What runs in the fresh interpreter that sandbox.py starts: it locks itself in, runs the program, tells how it ended.

Never imported by the project; imports nothing of it, and few modules, because every millisecond is paid per program.

    supervisor   this file as started. Enters new namespaces and the private root, starts the rest, keeps the clock,
       |         knows the completion token, writes the verdict. Unreachable from inside: other processes of the
       |         program's world cannot even name it.
    init         process 1 of the new process space: without rights, waits. When it ends, the kernel kills all others.
       |
    program      limits set, then the code.

Without isolation ("none") the program is the supervisor's direct child.

    python sandbox_child.py MECHANISM TIMEOUT_SECONDS MEMORY_BYTES VERDICT_FD < code

The verdict is one line: `done STATUS` (the end of the code was reached), `ended STATUS` (it was not), `timeout STATUS`
or `unavailable REASON`. STATUS is the exit status, 128 + the number for a signal.
"""

import os
import posix
import resource
import sys

# `signal` itself costs 3 ms, for its enums.
from _signal import SIG_DFL, SIGALRM, SIGINT, SIGKILL, setitimer, signal  # pyright: ignore[reportMissingImports]

try:
    import ctypes

    _libc = ctypes.CDLL(None, use_errno=True)
except (ImportError, OSError, TypeError):  # an interpreter without libffi
    ctypes = _libc = None

DISK_BYTES = 64 << 20  # of the working directory, and of the largest file
FILES = 4096
PROCESSES = 32  # and threads, the two of ours included
OPEN_FILES = 64
LAST_WORDS_BYTES = 16 << 20  # memory that is left for printing the traceback of a MemoryError
ROOT, USER, NONE = "root-namespaces", "user-namespaces", "none"

_CLONE = {"NEWNS": 0x20000, "NEWIPC": 0x8000000, "NEWPID": 0x20000000, "NEWNET": 0x40000000, "NEWUSER": 0x10000000}
_NOBODY = 65534
_TOKEN_BYTES = 32


def main() -> None:
    mechanism, timeout, memory, verdict_fd = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    source = _read_all(0)
    _prctl(1, SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the thread that waits for us
    if mechanism != NONE:
        try:
            _enter_namespaces(mechanism)
            _enter_private_root()
        except OSError as error:
            posix.write(verdict_fd, f"unavailable {error.filename}: {error.strerror}".encode())
            posix._exit(0)
    else:
        _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: daemons of the program become our children, so that we can kill them

    token_out, token_in = posix.pipe()
    report_out, report_in = posix.pipe()
    supervisor = posix.getpid()
    child = posix.fork()
    if child == 0:
        for fd in (verdict_fd, token_in, report_out):
            posix.close(fd)
        if mechanism != NONE:
            _drop_privileges(mechanism, supervisor)
            _become_init()
        else:
            _prctl(1, SIGKILL)
        posix.setsid()
        _set_limits(timeout, memory)
        _run(source, token_out, report_in)
        return

    # Made after the fork, so that no copy of it lies in the program's memory before the program starts.
    token = posix.urandom(_TOKEN_BYTES)
    posix.close(token_out)
    posix.close(report_in)
    posix.write(token_in, token)
    posix.close(token_in)
    expired = False

    def expire(*_) -> None:
        nonlocal expired
        expired = True
        _kill(child)

    signal(SIGALRM, expire)
    setitimer(0, timeout)
    status = _exit_status(posix.waitpid(child, 0)[1])  # with namespaces: returns when every process in them is dead
    setitimer(0, 0)
    if mechanism == NONE:
        _kill(child)
        _kill_orphans()
    posix.set_blocking(report_out, False)
    try:
        report = posix.read(report_out, 2 * _TOKEN_BYTES)
    except BlockingIOError:  # a survivor holds the pipe open; only without isolation
        report = b""
    outcome = "timeout" if expired else "done" if report == token and status == 0 else "ended"
    posix.write(verdict_fd, f"{outcome} {status}".encode())
    posix._exit(0)


def _run(source: bytes, token_fd: int, report_fd: int) -> None:
    """Run the code as `__main__`; only after its end is the token reported.

    While the code runs, the token is in no variable, constant, container or file descriptor: read before `exec` is
    called and written after it returns, it lies on the evaluation stack of this frame, which neither
    `sys._getframe`, nor `gc`, nor tracing shows.
    """
    null = posix.open("/dev/null", posix.O_RDONLY)
    posix.dup2(null, 0)
    posix.close(null)
    _disable()
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv[:] = [""]
    show_error = sys.excepthook
    try:
        code = compile(source.decode(), "<llm>", "exec", dont_inherit=True)
        posix.write(
            report_fd,
            posix.read(token_fd, _TOKEN_BYTES) + (posix.close(token_fd) or exec(code, module.__dict__) or b""),
        )
    except SystemExit:
        raise
    except BaseException as error:
        hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard_limit, hard_limit))
        traceback = error.__traceback__ and error.__traceback__.tb_next  # without the frame of this function
        show_error(type(error), error.with_traceback(traceback), traceback)
        raise SystemExit(1) from None


def _disable() -> None:
    """The reference's list of what a program may not call, so that the same programs pass. It protects from accidents,
    not from intent: the namespaces and limits do that."""
    names = (
        "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate replace "
        "unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir"
    )
    for name in names.split():
        if hasattr(os, name):
            setattr(os, name, None)
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None  # type: ignore[assignment]
    no_subprocess = type(sys)("_posixsubprocess")
    no_subprocess.fork_exec = None  # type: ignore[attr-defined]  # `import subprocess` works, Popen does not
    sys.modules["_posixsubprocess"] = no_subprocess


def _set_limits(timeout: float, memory: int) -> None:
    def limit(what: int, soft: int, hard: int | None = None) -> None:
        ceiling = resource.getrlimit(what)[1]
        fits = [n if ceiling == resource.RLIM_INFINITY else min(n, ceiling) for n in (soft, hard or soft)]
        try:
            resource.setrlimit(what, tuple(fits))  # type: ignore[arg-type]
        except (OSError, ValueError):  # macOS refuses RLIMIT_AS
            pass

    if memory:
        limit(resource.RLIMIT_AS, memory, memory + LAST_WORDS_BYTES)
    limit(resource.RLIMIT_CPU, int(timeout) + 2)
    limit(resource.RLIMIT_FSIZE, DISK_BYTES)
    limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    limit(resource.RLIMIT_CORE, 0)
    if _isolated:  # elsewhere the limit would count all the processes of this user
        limit(resource.RLIMIT_NPROC, PROCESSES)


# Namespaces. Linux only; the numbers are the kernel's interface and the same on every architecture.

_isolated = False


def _enter_namespaces(mechanism: str) -> None:
    global _isolated
    _isolated = True
    if _libc is None:
        raise OSError(0, "this Python has no working ctypes", "ctypes")
    try:  # when memory runs out, the kernel should take this process and not the training run
        _write_file("/proc/self/oom_score_adj", "1000")
    except OSError:
        pass
    uid, gid = posix.geteuid(), posix.getegid()
    posix.umask(0o022)  # the program must be able to enter the directories that we make
    flags = 0
    for name, flag in _CLONE.items():
        flags |= flag if name != "NEWUSER" or mechanism == USER else 0
    _call("unshare", _libc.unshare(flags))
    if mechanism == USER:
        _write_file("/proc/self/setgroups", "deny")
        _write_file("/proc/self/uid_map", f"{_NOBODY} {uid} 1")
        _write_file("/proc/self/gid_map", f"{_NOBODY} {gid} 1")


def _enter_private_root() -> None:
    """A root of its own: Python's and the system's libraries and four devices, read-only, and an empty /tmp."""
    assert _libc is not None
    private_recursive, bind_recursive, nosuid_nodev, read_only = 0x40000 | 0x4000, 0x1000 | 0x4000, 2 | 4, 1
    _mount("none", "/", "", private_recursive)
    # Any existing directory will do to build it in, as long as nothing that is bound below lies in it.
    _mount("tmpfs", "/proc", "tmpfs", nosuid_nodev, "size=1m,mode=755")
    posix.chdir("/proc")
    posix.mkdir("tmp")  # first, in case Python lives in /tmp
    _mount("tmpfs", "tmp", "tmpfs", nosuid_nodev, f"size={DISK_BYTES},nr_inodes={FILES},mode=1777")
    standard_library = os.path.dirname(os.__file__)
    paths = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", os.path.dirname(standard_library), *sys.path]
    files = ["/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    bound: list[str] = []
    present = sorted(filter(os.path.isdir, paths)) + list(filter(os.path.exists, files))
    for path in present:
        if any(path == done or path.startswith(done + "/") for done in bound):
            continue
        target = "." + path
        os.makedirs(target if path not in files else os.path.dirname(target), exist_ok=True)
        if path in files:
            posix.close(posix.open(target, posix.O_CREAT | posix.O_WRONLY))
        _mount(os.path.realpath(path), target, "", bind_recursive)
        bound.append(path)
    _mount_attributes(".", 0x8000, read_only | 2, 0)  # recursive; 2: nosuid
    _mount_attributes("tmp", 0, 0, read_only)
    _call("pivot_root", _libc.pivot_root(b".", b"."))
    _call("umount2", _libc.umount2(b".", 2))  # MNT_DETACH: the old root is gone
    posix.chdir("/tmp")


def _drop_privileges(mechanism: str, supervisor: int) -> None:
    """No capability, none to be regained, and as root's child an unprivileged user id that nothing else has."""
    assert ctypes is not None and _libc is not None
    for capability in range(64):
        _prctl(24, capability)  # PR_CAPBSET_DROP; fails above the last one
    if mechanism == ROOT:
        posix.setgroups([])
        # Its own id, since the limit on processes counts per user; in a container that has no such id, nobody.
        for uid in (1_000_000_000 + supervisor, _NOBODY):
            try:
                posix.setresgid(uid, uid, uid)
                posix.setresuid(uid, uid, uid)
                break
            except OSError:
                continue
        if posix.geteuid() == 0:
            posix._exit(1)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if _libc.capset(header, nothing) or _prctl(38, 1) or _prctl(4, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE
        posix._exit(1)
    _prctl(1, SIGKILL)  # PR_SET_PDEATHSIG, which changing the user id has reset


def _become_init() -> None:
    """Fork; return in the child. The parent is process 1 of the process space, ends as the child does."""
    program = posix.fork()
    if program == 0:
        return
    signal(SIGINT, SIG_DFL)  # process 1 receives no signal from inside that it has no handler for
    while True:
        pid, status = posix.wait()
        if pid == program:
            posix._exit(_exit_status(status))


# Small helpers.


def _kill(child: int) -> None:
    for kill in (posix.killpg, posix.kill):
        try:
            kill(child, SIGKILL)
        except OSError:
            pass


def _kill_orphans() -> None:
    """Kill what the program left behind and the kernel gave to us (Linux)."""
    for _ in range(1000):
        try:
            with open(f"/proc/self/task/{posix.getpid()}/children") as file:
                children = file.read().split()
        except OSError:
            return
        if not children:
            return
        for pid in children:
            _kill(int(pid))
            posix.waitpid(int(pid), 0)


def _exit_status(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def _read_all(fd: int) -> bytes:
    parts = []
    while part := posix.read(fd, 1 << 16):
        parts.append(part)
    return b"".join(parts)


def _write_file(path: str, text: str) -> None:
    fd = posix.open(path, posix.O_WRONLY)
    try:
        posix.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        posix.close(fd)


def _call(what: str, result: int) -> None:
    assert ctypes is not None
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    assert ctypes is not None and _libc is not None
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _call(f"mount {source} on {target}", result)


def _mount_attributes(target: str, flags: int, add: int, remove: int) -> None:
    """mount_setattr; unlike a remount it reaches, if flags say recursive, what is mounted further down."""
    assert ctypes is not None and _libc is not None
    attributes, at_fdcwd, number = (ctypes.c_uint64 * 4)(add, remove, 0, 0), -100, 442  # the same on every architecture
    arguments = [*map(ctypes.c_long, (number, at_fdcwd)), target.encode(), ctypes.c_long(flags), attributes]
    _call("mount_setattr (Linux 5.12 or newer)", _libc.syscall(*arguments, ctypes.c_long(32)))


def _prctl(option: int, value: int) -> int:
    if ctypes is None or _libc is None or sys.platform != "linux":
        return -1
    return _libc.prctl(ctypes.c_int(option), *[ctypes.c_ulong(n) for n in (value, 0, 0, 0)])


if __name__ == "__main__":
    main()
