"""Detects NaN and spiking steps and saves a reproducer of each.

    <run>/incidents/00000123/batch.npz       inputs, targets, weights (A, B, T) of the skipped step
    <run>/incidents/00000123/params/         the parameters it was computed with (orbax arrays)
    <run>/incidents/00000123/incident.json   numbers, reason, the run's meta; written last

Consecutive skipped steps have the same parameters: only the first of them keeps a copy. `scripts.replay`
computes such a step again.
"""

import json
import math
import shutil
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from nanochat_jax.parallel import multihost
from nanochat_jax.utils import paths

WINDOW, ENOUGH = 100, 20  # steps that make the running level; fewer than ENOUGH make none
KEPT = 8  # incidents on disk
HELD = np.full((2,), -np.inf, np.float32)  # limits that hold a step back


class Level:
    """The running level of loss and gradient norm, and from it the largest of each that a step may have.

    A loss may be `factor` times the spread of the last losses (from the 10th to the 90th percentile) above their
    median, a gradient norm `factor` times the median of the last ones; 0 takes no offence at any finite number. The
    limits of a step come from the steps up to the one before the last, whether or not the last one is known yet: so
    they are the same in a resumed run.
    """

    def __init__(self, factor: float, records: Iterable[dict] = ()):
        self.factor = factor
        self._kept: deque[tuple[int, float, float]] = deque(maxlen=WINDOW + 2)
        for record in records:
            if record["kind"] == "train":
                self.add(record["step"], record["loss"], record["grad_norm"])

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        """A step that was kept."""
        self._kept.append((step, loss, grad_norm))

    def limits(self, step: int) -> np.ndarray:
        """The largest (loss, grad_norm) that `step` may have, float32 (2,)."""
        known = [(loss, norm) for at, loss, norm in self._kept if at <= step - 2][-WINDOW:]
        losses = np.array([loss for loss, _ in known], np.float64)
        norms = np.array([norm for _, norm in known if norm > 0], np.float64)  # no rewards: no gradient, and no measure
        loss = norm = math.inf
        if self.factor > 0 and len(norms) >= ENOUGH:
            low, middle, high = np.quantile(losses, (0.1, 0.5, 0.9))
            loss = middle + self.factor * (high - low) if high > low else math.inf
            norm = self.factor * np.median(norms)
        return np.array([loss, norm], np.float32)


def reason(loss: float, grad_norm: float, limits: np.ndarray) -> str:
    """Why a step was skipped, in words."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
    if grad_norm > limits[1]:
        return f"gradient norm {grad_norm:.4g}, where at most {limits[1]:.4g} was expected"
    return f"loss {loss:.4g}, where at most {limits[0]:.4g} was expected"


def plain(value: float) -> float | str:
    """A number as JSON has it; "nan", "inf" and "-inf" as text."""
    return value if math.isfinite(value) else str(value)


def skipped_in_a_row(records: Iterable[dict]) -> int:
    """How many steps at the end of the records were skipped one after the other."""
    count = 0
    for record in records:
        count = count + 1 if record["kind"] == "skip" else 0 if record["kind"] == "train" else count
    return count


def folder(run: Path, step: int) -> Path:
    return run / "incidents" / f"{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps with a complete incident, ascending."""
    return sorted(int(p.parent.name) for p in (run / "incidents").glob("[0-9]*/incident.json"))


def keep(run: Path, step: int, batch: Any, params: Any, facts: dict, in_a_row: int) -> Path:
    """Writes an incident, and drops the oldest beyond KEPT. All processes call it; batch: whole, on the main process.

    in_a_row: which skipped step in a row it is, from 1. Where the disk has no room for the parameters, the batch alone
    is kept. facts: JSON-able, for `scripts.replay`.
    """
    final = folder(run, step)
    temporary = final.with_name(f".{final.name}.writing")
    main = multihost.is_main()
    own = in_a_row == 1
    if main:
        temporary.parent.mkdir(exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        need = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        own = own and shutil.disk_usage(run).free > need
    own = multihost.agree(own)
    if own:
        ocp.save(str(temporary / "params"), {"params": params})
    if main:
        inputs, targets, weights = batch
        np.savez(temporary / "batch.npz", inputs=inputs, targets=targets, weights=weights)
        where = f"{step - in_a_row + 1:08d}"
        text = json.dumps({"step": step, "params": where, **facts}, indent=2)
        paths.write_atomic(temporary / "incident.json", text)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in steps(run)[: -max(KEPT, in_a_row)]:
            shutil.rmtree(folder(run, old), ignore_errors=True)
    multihost.barrier(f"incident {step}")
    return final
