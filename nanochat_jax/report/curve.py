"""Scaling curves: what training at several depths cost and reached, and what a change is worth in compute.

Bits per byte are only comparable on the same held-out rows, and a model is at home in the packing it was trained with
(by 0.07 to 0.14 bits at depth 2). So every rung is measured on rows of every packing, and the curves compared on each.

The worth of a change is its compute multiplier: how many FLOPs the baseline needs for each of the variant's, at equal
bits per byte. Between the depths that were trained, curves are straight in (log FLOPs, log bits per byte); beyond them
nothing is said.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.paths import base_dir, write_atomic

CURVE = "curve.jsonl"
GRID = 101  # points at which two curves are compared


class CurveError(UserError, ValueError):
    """Curves that cannot be compared; the message says what to do."""


@dataclass(frozen=True)
class Rung:
    """One trained model. flops: of the whole training; seconds: of its steps; off: the parts left out; bpb: held-out
    bits per byte by the packing of the rows."""

    run: str
    recipe: str
    off: str
    depth: int
    seed: int
    parameters: int
    tokens: int
    flops: float
    seconds: float
    bpb: dict[str, float]


def folder_of(name: str) -> Path:
    """Where a miniseries keeps its curve and its page."""
    return base_dir() / "miniseries" / name


def load(name: str) -> list[Rung]:
    """The rungs of a miniseries. Raises CurveError if there is none of that name."""
    path = folder_of(name) / CURVE
    if not path.is_file():
        known = sorted(p.parent.name for p in path.parent.parent.glob(f"*/{CURVE}")) or ["none"]
        raise CurveError(f"there is no miniseries {name!r} in {path.parent.parent}; there: {', '.join(known)}")
    rungs = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    if any("bpb" not in rung for rung in rungs):
        raise CurveError(f"{path} was not measured on rows of every packing: train that ladder under another --name")
    return [Rung(**rung) for rung in rungs]


def save(name: str, rungs: Sequence[Rung]) -> None:
    """Writes the curve, one rung a line."""
    folder = folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CURVE, "".join(json.dumps(dataclasses.asdict(rung)) + "\n" for rung in rungs))


def seeds_of(rungs: Sequence[Rung]) -> list[int]:
    """The seeds that every depth was trained with."""
    depths = {rung.depth for rung in rungs}
    common = [{rung.seed for rung in rungs if rung.depth == depth} for depth in depths]
    return sorted(set.intersection(*common)) if common else []


@dataclass(frozen=True)
class Multiplier:
    """Baseline FLOPs over variant FLOPs at equal bits per byte: the geometric mean over the bits per byte that both
    curves reach, and over seeds. low, high: its 95 % interval (Student's t over the seeds' logarithms); None: there is
    but one seed."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return "cannot tell: one seed gives no interval (--seeds)"
        if self.low <= 1.0 <= self.high:
            return "cannot tell: the interval holds 1"
        return "better" if self.low > 1.0 else "worse"

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{interval}"


def multiplier(baseline: Sequence[Rung], variant: Sequence[Rung], packing: str) -> Multiplier:
    """What the variant is worth, on held-out rows of that packing. Where both have several seeds, the n-th of one is
    compared with the n-th of the other.

    Raises CurveError for curves of one depth, curves that do not fall, and curves that reach no common bits per byte.
    """
    logs = []
    for ours, theirs in zip(seeds_of(variant), seeds_of(baseline), strict=False):
        curves = (_curve(baseline, theirs, packing), _curve(variant, ours, packing))
        logs.append(_log_multiplier(*curves))
    if not logs:
        raise CurveError("no seed was trained at every depth: run the same command again to complete the ladder")
    mean = float(np.mean(logs))
    if len(logs) == 1:
        return Multiplier(math.exp(mean), None, None, 1)
    spread = float(stats.t.ppf(0.975, len(logs) - 1)) * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    return Multiplier(math.exp(mean), math.exp(mean - spread), math.exp(mean + spread), len(logs))


def _curve(rungs: Sequence[Rung], seed: int, packing: str) -> tuple[np.ndarray, np.ndarray]:
    """(log bits per byte, rising; log FLOPs) of one seed."""
    ladder = sorted((r for r in rungs if r.seed == seed), key=lambda r: r.flops)
    if len(ladder) < 2:
        raise CurveError(f"{ladder[0].run}: a curve needs at least two depths; give more with --depths")
    for smaller, larger in zip(ladder, ladder[1:], strict=False):
        if larger.bpb[packing] >= smaller.bpb[packing]:
            raise CurveError(
                f"{larger.run} took more FLOPs than {smaller.run} and reached no fewer bits per byte "
                f"({larger.bpb[packing]:.4f} against {smaller.bpb[packing]:.4f}): train longer, or leave that depth out"
            )
    return np.log([r.bpb[packing] for r in ladder[::-1]]), np.log([r.flops for r in ladder[::-1]])


def _log_multiplier(baseline: tuple[np.ndarray, np.ndarray], variant: tuple[np.ndarray, np.ndarray]) -> float:
    low = max(baseline[0][0], variant[0][0])
    high = min(baseline[0][-1], variant[0][-1])
    if low >= high:
        spans = [f"{math.exp(bpb[0]):.4f} to {math.exp(bpb[-1]):.4f}" for bpb, _ in (baseline, variant)]
        raise CurveError(
            f"the curves do not overlap: the baseline spans {spans[0]} bits per byte, the variant {spans[1]}; add a "
            "smaller or larger depth to one of them (--depths)"
        )
    at = np.linspace(low, high, GRID)
    return float(np.mean(np.interp(at, *baseline) - np.interp(at, *variant)))
