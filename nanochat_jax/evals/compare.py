"""Compares two runs on the problems both have answered: better, worse, or cannot tell.

python -m scripts.compare d20-mid d20-sft            the newest results of both runs
python -m scripts.compare d20-sft@700 d20-sft@1400   of two checkpoints of one run

Problems are paired, which sees far smaller differences than comparing two accuracies: what both get right or both get
wrong says nothing. "cannot tell" means that the 95 % interval of the difference holds 0, or that McNemar's exact test
(a sign-flip test where several samples were drawn) gives p above 0.05. Of many tasks, one in twenty looks different by
chance. CORE is compared over the items of all its tasks together, each counting the same.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_jax.evals import results, stats
from nanochat_jax.evals.results import Result
from nanochat_jax.utils import errors, flags, paths
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.flags import flag

SIGNIFICANT = 0.05


class CompareError(UserError, ValueError):
    """Two runs cannot be compared; the message says why and what to do."""


@dataclass(frozen=True)
class CompareSettings:
    """Flags of scripts.compare, after the two runs."""

    tasks: str = flag("", "only these tasks, separated by |; default: all that both runs have", short="a")


@dataclass(frozen=True)
class Comparison:
    """B against A on one task: difference = B - A over the n common problems; notes say what does not match."""

    task: str
    verdict: str
    difference: float
    low: float
    high: float
    p: float
    n: int
    notes: tuple[str, ...] = ()


def compare(a: Result, b: Result) -> Comparison:
    """Compares result b with result a of the same task, problem by problem.

    Where each problem was answered several times ("n_correct"), the shares of right answers are compared. Problems are
    matched by their ids, which name their content; what only one side has is left out, and noted. Raises CompareError
    if nothing is left, or if the two had different numbers of samples.
    """
    task = a["task"]
    samples = [r["settings"].get("num_samples", 1) for r in (a, b)]
    if samples[0] != samples[1]:
        raise CompareError(f"{task}: {samples[0]} samples a problem on one side, {samples[1]} on the other")
    left, right = ({item["id"]: item.get("n_correct", item["correct"]) for item in r["items"]} for r in (a, b))
    common = [key for key in left if key in right]
    if not common:
        raise CompareError(f"{task}: the two were evaluated on different problems; evaluate both on the same data")
    notes = []
    if len(common) < max(len(left), len(right)):
        notes.append(f"only the {len(common):,} problems that both have (of {len(left):,} and {len(right):,})")
    if changed := _changed(a["settings"], b["settings"]):
        notes.append(f"other settings: {changed}")
    values = [np.array([side[key] for key in common]) / samples[0] for side in (right, left)]
    difference, low, high, p = stats.paired_difference(*values)
    verdict = "cannot tell"
    if p <= SIGNIFICANT and not low <= 0 <= high:
        verdict = "better" if difference > 0 else "worse"
    return Comparison(task, verdict, difference, low, high, p, len(common), tuple(notes))


# Which problems were asked shows in their ids.
_ASKED = {"max_problems", "data"}


def _changed(a: dict[str, Any], b: dict[str, Any]) -> str:
    keys = [k for k in {**a, **b} if k not in _ASKED and a.get(k) != b.get(k)]
    return ", ".join(f"{k} {a.get(k)} and {b.get(k)}" for k in keys)


def load(name: str) -> dict[str, Result]:
    """The results that can be compared of NAME (newest step) or NAME@STEP. Raises CompareError if there are none."""
    run, _, step = name.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", run) or (step and not step.isdecimal()):
        raise CompareError(f"{name!r} is not a run: give its name, or NAME@STEP")
    folder = paths.runs_dir() / run
    if not folder.is_dir():
        known = sorted(p.name for p in paths.runs_dir().glob("*") if results.steps(p)) or ["none"]
        raise CompareError(f"there is no run {run!r} in {paths.runs_dir()}; with results there are: {', '.join(known)}")
    found = results.load(folder, int(step) if step else None)
    found = {task: result for task, result in found.items() if "skipped" not in result and "correct" in _first(result)}
    if not found:
        at = f"step {step} of {run}" if step else run
        done = ", ".join(map(str, results.steps(folder))) or "none"
        raise CompareError(
            f"{at} has no results to compare (steps with results: {done}): `python -m scripts.eval --run_name={run}`"
        )
    return found


def _first(result: Result) -> dict:
    return next(iter(result.get("items") or [{}]))


def report(a: str, b: str, only: Sequence[str] = ()) -> str:
    """A table of every task that both runs have (or of those in `only`), with what could not be compared below it."""
    left, right = load(a), load(b)
    tasks = [task for task in left if task in right and (not only or task in only)]
    if missing := [task for task in only if task not in tasks]:
        raise CompareError(f"not evaluated for both {a} and {b}: {', '.join(missing)}")
    if not tasks:
        raise CompareError(f"{a} and {b} have no task in common: {a} has {', '.join(left)}; {b} has {', '.join(right)}")
    rows, notes = [["task", f"{b} is", "difference", "95 % interval", "p", "n"]], []
    for task in tasks:
        try:
            found = compare(left[task], right[task])
        except CompareError as error:
            notes.append(str(error))
            continue
        notes += [f"{task}: {note}" for note in found.notes]
        interval = f"[{found.low:+.4f}, {found.high:+.4f}]"
        rows.append([task, found.verdict, f"{found.difference:+.4f}", interval, f"{found.p:.4f}", f"{found.n:,}"])
    if one_sided := [task for task in {**left, **right} if (task in left) != (task in right)]:
        notes.append(f"only one of the two has: {', '.join(one_sided)}")
    steps = [next(iter(found.values())) for found in (left, right)]
    title = " against ".join(f"{r['run']} (step {r['step']:,})" for r in reversed(steps))
    return "\n".join([title, "", results.aligned(rows), *(["", *notes] if notes else [])])


def main(argv: Sequence[str]) -> int:
    """The command line: two runs, then flags. Exit status: 0 compared, 1 nothing to compare, 2 bad arguments."""
    names = []
    rest = list(argv)
    while rest and not rest[0].startswith("-"):
        names.append(rest.pop(0))
    settings = flags.parse(CompareSettings, rest, __doc__ or "", echo=False)
    if len(names) != 2:
        print(f"error: two runs are needed, got {len(names)}: python -m scripts.compare A B", file=sys.stderr)
        return 2
    only = [name.strip() for name in settings.tasks.split("|") if name.strip()]
    return errors.exit_status(lambda: print(report(*names, only=only)))
