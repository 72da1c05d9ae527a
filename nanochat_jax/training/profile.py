"""A trace of a few steps, for XProf (`pip install xprof`, then `xprof --logdir=RUN/profile`).

Operations carry the names of their parts of the step, given where these are written: attention, mlp, norm, loss,
exchange, optimizer. On a GPU the trace shows what every kernel took; on a CPU it shows the host.
"""

import re
from collections.abc import Callable
from pathlib import Path

import jax

from nanochat_jax.utils.errors import InputError

FOLDER = "profile"  # in the run's folder


class Profile:
    """Traces the steps "first:end" (end left out; "": none) into a folder. Raises InputError for anything else."""

    def __init__(self, steps: str, folder: Path):
        found = re.fullmatch(r"(\d+):(\d+)", steps)
        if steps and (found is None or int(found[1]) >= int(found[2])):
            raise InputError(f"--profile_steps wants first:end, as in 10:13 for steps 10 to 12, got {steps!r}")
        self.steps = range(int(found[1]), int(found[2])) if found else range(0)
        self.folder, self.running = folder / FOLDER, False

    def step_begins(self, step: int, settle: Callable[[], object]) -> None:
        """Before `step` is dispatched; `settle` waits for the step before, so that the trace holds whole steps."""
        if (step in self.steps) != self.running:
            settle()
            self.stop() if self.running else self._start()

    def _start(self) -> None:
        jax.profiler.start_trace(str(self.folder))
        self.running = True

    def stop(self) -> None:
        """Ends the trace and writes it, if one is under way."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
