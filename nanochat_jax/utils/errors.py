"""How a command ends when something goes wrong: one line that says what to do where the user can fix it, a traceback
where the program is at fault. Every main is run by `exit_status`.

The class of an error decides. `UserError` and what derives from it is shown in one line, and so is what the operating
system says of a file, a disk or the network. Everything else, a plain ValueError above all, is a bug.
"""

import contextlib
import errno
import os
import select
import socket
import sys
from collections.abc import Callable, Mapping

INTERRUPTED = 130  # by Ctrl-C: the status that shells use
UNREAD = 141  # the reader of the output (head, a pager) has gone: the status of a process ended by SIGPIPE
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

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


class UserError(Exception):
    """Something that the user can fix; the text says how. All exceptions of this project that a command may end with
    derive from it, often beside the built-in class that describes them to callers in Python."""


class InputError(UserError, ValueError):
    """What the user gave (a flag, a setting, a file of data, a command of the chat) cannot be used."""


class StorageError(UserError, OSError):
    """A file or folder cannot be written."""


def exit_status(
    action: Callable[[], int | None],
    statuses: Mapping[type[BaseException], int] | None = None,
    stopped: str = "stopped",
) -> int:
    """Runs a command and returns its exit status: what the action returns (None is 0), 1 after an error that is shown
    in one line, INTERRUPTED after Ctrl-C, UNREAD where the output is read no further.

    statuses: other ones for some kinds of errors. stopped: what is said after Ctrl-C. What the user cannot fix
    (`is_users` is false) is raised on, which shows the traceback; so is SystemExit (a bad flag).
    """
    known = statuses or {}
    _open_streams()
    try:
        status = action() or 0
        sys.stdout.flush()  # here, where it can be judged, and not at exit
        return status
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        status = next((known[kind] for kind in known if isinstance(error, kind)), None)
        if isinstance(error, BrokenPipeError) and _output_is_unread():
            return UNREAD if status is None else status
        if not is_users(error):
            raise
        print(f"error: {in_words(error)}", file=sys.stderr)
        _drop_unwritable()
        return 1 if status is None else status


def _open_streams() -> None:
    """Makes the standard streams usable whatever the process was started with: one that is closed becomes the null
    device (else the next file that is opened gets its number, and what is printed), and a character that the encoding
    lacks is replaced."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode, closefd=False))
        elif name != "stderr":  # which shows such characters in another way
            with contextlib.suppress(AttributeError, OSError, ValueError):  # no such method, or already read from
                stream.reconfigure(errors="replace")


def _drop_unwritable() -> None:
    """Forgets output that cannot be written: without this Python complains about it once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_users(error: BaseException) -> bool:
    """Whether the user can fix it: a `UserError`, or what the operating system says of a named file, of a full disk or
    of the network."""
    if isinstance(error, UserError):
        return True
    if isinstance(error, FileNotFoundError | ConnectionError | TimeoutError | socket.gaierror):
        return not isinstance(error, BrokenPipeError)
    return isinstance(error, OSError) and (bool(error.filename) or error.errno in DISK_FULL)


def in_words(error: BaseException) -> str:
    """The text of an error that `is_users`; for one of the operating system the file's name first and a remedy last."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{where}{error.strerror}" + (f": {remedy}" if remedy else "")


def _output_is_unread() -> bool:
    """Whether the other end of standard output is closed. What is left in its buffer is then dropped: without this
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
