"""Which errors end a command with one line, and which with a traceback."""

import traceback
from pathlib import Path

import nanochat_jax
import tasks

_OURS = tuple(Path(package.__file__ or "").resolve().parent for package in (nanochat_jax, tasks))


def is_ours(error: BaseException) -> bool:
    """Whether a `raise` of this project is where the error comes from: its text then names the remedy, and a traceback
    would only hide it. What a library raises, or a slip in a line of ours, is shown whole. What the operating system
    says of a named file is the user's to mend.
    """
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.filename):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    folders = Path(frames[-1].filename).resolve().parents
    return any(package in folders for package in _OURS) and (frames[-1].line or "").startswith("raise")
