"""Following a run that is being trained: its newest complete checkpoint is loaded and takes over between requests."""

import logging
import threading
from dataclasses import replace
from pathlib import Path

from nanochat_jax.runs import checkpoint
from nanochat_jax.serve.worker import Worker

logger = logging.getLogger(__name__)

POLL_S = 2.0


class Watcher:
    """A thread that looks for a newer checkpoint in `run` (a run's directory) every `poll` seconds.

    A checkpoint that cannot be used (another shape, another tokenizer, removed or damaged meanwhile) is logged once and
    passed over; the server keeps the one it has.
    """

    def __init__(self, worker: Worker, run: Path, meta: dict, poll: float = POLL_S):
        """meta: of the checkpoint that is being served."""
        self._worker, self._run, self._meta, self._poll = worker, run, meta, poll
        self._seen = meta["step"]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._stopping.wait(self._poll):
            try:
                self._look()
            except Exception:
                logger.exception("cannot use the checkpoint of step %d in %s", self._seen, self._run)

    def _look(self) -> None:
        available = checkpoint.steps(self._run)
        if self._worker.swapping or not available or available[-1] == self._seen:
            return
        self._seen = step = available[-1]
        meta = checkpoint.load_meta(self._run, step)
        for field in ("config", "tokenizer_hash"):
            if meta[field] != self._meta[field]:
                raise checkpoint.CheckpointError(f"it has another {field}; start the server again to serve it")
        params = checkpoint.load_params(self._run, meta)
        self._worker.replace(params, replace(self._worker.model, step=step, created=saved_at(self._run, step)))


def saved_at(run: Path, step: int) -> int:
    """When a checkpoint was completed, in Unix seconds."""
    return int((checkpoint.step_dir(run, step) / "meta.json").stat().st_mtime)
