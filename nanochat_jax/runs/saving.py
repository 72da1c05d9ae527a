"""Asynchronous checkpointing: the loop copies the state and resumes, a thread writes it.

orbax's own Checkpointer is not used: it publishes a step before checksums of its files can be written into it.
"""

import logging
import threading
from pathlib import Path
from typing import Any

from nanochat_jax.runs import checkpoint

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run, one at a time.

    keep: newest checkpoints kept (0: all); keep_every: those of every so many steps stay for good (0: none);
    background: False writes within `save`. What goes wrong in the thread is raised, as CheckpointError, by the next
    call of `check`, `save` or `close`, whichever comes first.
    """

    def __init__(self, run: Path, keep: int = 2, keep_every: int = 0, background: bool = True):
        self._run, self._keep, self._keep_every, self._background = run, keep, keep_every, background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Returns when the state is copied and may be overwritten. Waits for a save still under way."""
        self.close()
        finish = checkpoint.begin_save(self._run, step, state, meta, self._keep, self._keep_every)
        if not self._background:
            finish()
            return

        def work() -> None:
            try:
                finish()
            except BaseException as error:  # noqa: B036 - raised in the loop
                self._error = error

        self._thread = threading.Thread(target=work, name=f"save-{step}", daemon=True)
        self._thread.start()

    @property
    def writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raises what went wrong in the thread, if anything did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits until what was handed over is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def give_up(self) -> None:
        """Waits like `close`, but only reports what went wrong: another error is on its way."""
        try:
            self.close()
        except checkpoint.CheckpointError as error:
            logger.error("%s", error)
