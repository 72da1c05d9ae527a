"""How a command ends when something goes wrong: one line that says what to do where the user can mend it, a traceback
where the program is at fault. Every main is run by `exit_status`.
"""

import dis
import errno
import os
import select
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

STOPPED = 130  # by Ctrl-C, as a shell says it
UNREAD = 141  # whoever read the output (head, a pager) has gone: what a shell says of other programs then
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_RAISE = dis.opmap["RAISE_VARARGS"]
_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(_ROOT / name for name in ("nanochat_jax", "tasks", "scripts", "dev"))
_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file where a folder is needed; choose another path",
    errno.EISDIR: "a file is needed; choose another path",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EIO: "the disk or its connection is failing; copy the file to another one",
    **dict.fromkeys(DISK_FULL, "free some space, then run the same command again"),
}


def exit_status(
    action: Callable[[], int | None],
    statuses: Mapping[type[BaseException], int] | None = None,
    stopped: str = "stopped",
) -> int:
    """Runs a command and returns its exit status: what the action returns (None is 0), 1 after an error that is shown
    in one line, STOPPED after Ctrl-C, UNREAD where the output is read no further.

    statuses: other ones for some kinds of errors. stopped: what is said after Ctrl-C. What is not the user's to mend
    (`is_ours`) is raised on, which shows the traceback; so is SystemExit, with which `cli` ends on bad flags.
    """
    known = statuses or {}
    try:
        status = action() or 0
        sys.stdout.flush()  # here, where it can be judged, and not at exit
        return status
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED
    except Exception as error:
        status = next((known[kind] for kind in known if isinstance(error, kind)), None)
        if isinstance(error, BrokenPipeError) and _output_is_unread():
            return UNREAD if status is None else status
        if not is_ours(error):
            raise
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 1 if status is None else status


def is_ours(error: BaseException) -> bool:
    """Whether the error is one that this project foresaw, so that its text names the remedy and a traceback would only
    hide it: an exception of its own, or a ValueError, RuntimeError or OSError from a `raise` of its own. What the
    operating system says of a named file, of a disk or of the network is the user's to mend, too. Anything else that a
    library raises, and every slip in a line of ours, is shown whole.
    """
    if type(error).__module__.partition(".")[0] in ("nanochat_jax", "tasks"):
        return True
    if isinstance(error, FileNotFoundError | ConnectionError | TimeoutError | socket.gaierror):
        return not isinstance(error, BrokenPipeError)
    if isinstance(error, OSError) and (error.filename or error.errno in DISK_FULL):
        return True
    last = error.__traceback__
    if last is None or not isinstance(error, ValueError | RuntimeError | OSError):
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    folders = Path(code.co_filename).resolve().parents
    # the instruction itself says it: a slip inside a raise statement is none, and no source is needed
    return code.co_code[last.tb_lasti] == _RAISE and any(package in folders for package in _OURS)


def in_words(error: BaseException) -> str:
    """The text of an error that `is_ours`; for one of the operating system with the file's name first and a remedy."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{where}{error.strerror}" + (f": {remedy}" if remedy else "")


def _output_is_unread() -> bool:
    """Whether the other end of standard output is closed. What is left in its buffer is then let go: without this
    Python complains about it at exit."""
    try:
        output = sys.stdout.fileno()
        poll = select.poll()
        poll.register(output, 0)  # errors are reported unasked
        closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no file, or a system without poll
        return False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed
