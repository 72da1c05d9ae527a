"""Where results of evaluations are saved, and the figures computed from several.

    <run>/evals/step-00000200/GSM8K.json      one file per task, the items included

A result is a plain dict:

    task, kind ("core", "bpb", "categorical", "generative", "samples"), run, stage, step, time (ISO 8601), seconds,
    settings {}, n, accuracy, baseline, centered = (accuracy - baseline) / (1 - baseline), interval [low, high],
    items [{"id": ..., "correct": 0 or 1, ...}], and what its kind adds ("bpb", "unfinished", "pass_at_k", ...)

`interval` belongs to the figure that `value` names. A result with "skipped" says why there is none.
"""

import datetime
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.evals import stats
from nanochat_jax.utils import paths
from nanochat_jax.utils.errors import InputError, UserError

Result = dict[str, Any]

STAGES = ("base", "mid", "sft", "rl")
# The tasks of ChatCORE and what guessing scores there; the reference counts four choices for every ARC question.
CHAT_BASELINES = {
    "ARC-Easy": 0.25,
    "ARC-Challenge": 0.25,
    "MMLU": 0.25,
    "GSM8K": 0.0,
    "HumanEval": 0.0,
    "SpellingBee": 0.0,
}

_STEP = re.compile(r"step-(\d{8})")
_EARLIER = ".earlier-"  # in the name of a result that another one, made with other settings, has replaced


class ResultError(UserError, RuntimeError):
    """A saved result cannot be read or written; the message names the file and the remedy."""


def scored(
    task: str, kind: str, items: Sequence[dict], baseline: float, settings: Mapping[str, Any], seconds: float, **more
) -> Result:
    """The result of a task whose items carry "correct": accuracy with its bootstrap interval, and `more` fields."""
    correct = np.array([item["correct"] for item in items], np.float64)
    accuracy = float(correct.mean())
    return {
        "task": task,
        "kind": kind,
        "accuracy": accuracy,
        "interval": list(stats.bootstrap_interval(correct)),
        "n": len(items),
        "baseline": baseline,
        "centered": (accuracy - baseline) / (1 - baseline),
        "settings": dict(settings),
        "seconds": round(seconds, 3),
        **more,
        "items": list(items),
    }


def value(result: Result) -> float | None:
    """The one figure of a result: bits per byte, the CORE metric, otherwise the accuracy. None: it has none."""
    return result.get({"bpb": "bpb", "core": "centered"}.get(result["kind"], "accuracy"))


def folder_of(run_folder: Path, step: int) -> Path:
    return run_folder / "evals" / f"step-{step:08d}"


def path_of(run_folder: Path, step: int, task: str) -> Path:
    """The file of a task's result. A slash in the name ("world/sums") becomes two dashes."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", task) or _EARLIER in task:
        raise InputError(f"task name {task!r} may hold only letters, digits, dots, dashes, underscores and slashes")
    return folder_of(run_folder, step) / f"{task.replace('/', '--')}.json"


def save(run_folder: Path, step: int, result: Result) -> Path:
    """Writes a result atomically, with the run's name, the step and the time, and returns the file.

    A result of the same task and step made with other settings is not lost: it is renamed. Raises ResultError for a
    figure that is infinite or no number.
    """
    path = path_of(run_folder, step, result["task"])
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    document = {"run": run_folder.name, "step": step, "time": now, **result}
    try:
        text = json.dumps(document, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise ResultError(f"the result of {result['task']} cannot be saved to {path}: {error}") from error
    if path.exists():
        before = _read(path)["settings"]
        if before != result["settings"]:
            digest = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:8]
            os.replace(path, path.with_name(f"{path.stem}{_EARLIER}{digest}.json"))
    paths.write_atomic(path, text)
    return path


def steps(run_folder: Path) -> list[int]:
    """Steps that have a result, ascending."""
    found = [_STEP.fullmatch(p.parent.name) for p in run_folder.glob("evals/step-*/*.json")]
    return sorted({int(match[1]) for match in found if match})


def load(run_folder: Path, step: int | None = None) -> dict[str, Result]:
    """Task name -> result of a step (default: the newest that has any); empty where there is none."""
    if step is None:
        done = steps(run_folder)
        if not done:
            return {}
        step = done[-1]
    files = sorted(p for p in folder_of(run_folder, step).glob("*.json") if _EARLIER not in p.name)
    return {result["task"]: result for result in map(_read, files)}


def find(run_folder: Path, step: int, task: str, settings: Mapping[str, Any]) -> Result | None:
    """The saved result of exactly these settings, if there is one that was not skipped."""
    path = path_of(run_folder, step, task)
    if not path.exists():
        return None
    result = _read(path)
    same = json.dumps(result["settings"], sort_keys=True) == json.dumps(dict(settings), sort_keys=True)
    return result if same and "skipped" not in result else None


def _read(path: Path) -> Result:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not {"task", "kind", "settings"} <= result.keys():
            raise ValueError("task, kind and settings are needed")
    except (ValueError, AttributeError) as error:
        raise ResultError(f"{path} is not a result ({error}): delete it and evaluate again") from None
    return result


def chatcore(results: Mapping[str, Result]) -> tuple[float, tuple[float, float]] | None:
    """(ChatCORE, its interval): the mean of the six tasks' centred accuracies; None unless all six are there."""
    tasks = [results[name] for name in CHAT_BASELINES if name in results and value(results[name]) is not None]
    if len(tasks) < len(CHAT_BASELINES):
        return None
    baselines = np.array(list(CHAT_BASELINES.values()))

    def mean_centred(means: np.ndarray) -> np.ndarray:
        return ((means - baselines) / (1 - baselines)).mean(-1)

    figure = float(mean_centred(np.array([task["accuracy"] for task in tasks])))
    return figure, stats.stratified_interval([[i["correct"] for i in t["items"]] for t in tasks], mean_centred)


def shown(result: Result) -> str:
    """The figure and its interval as a person reads them."""
    figure = value(result)
    if "skipped" in result:
        return "skipped"
    if figure is None:
        return "-"
    return _shown(figure, result.get("interval"))


def _shown(figure: float, interval: Sequence[float] | None) -> str:
    return f"{figure:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def table(results_by_stage: Mapping[str, Mapping[str, Result]]) -> str:
    """A Markdown table, readable as it stands: a row per metric, a column per stage, figures with their intervals."""
    stages = [s for s in STAGES if s in results_by_stage] + [s for s in results_by_stage if s not in STAGES]
    names = list(dict.fromkeys(n for s in stages for n, r in results_by_stage[s].items() if r["kind"] != "samples"))
    front = ["bpb", "CORE", *CHAT_BASELINES]
    names.sort(key=lambda name: (front.index(name) if name in front else len(front), name))
    rows = [["metric", *(s.upper() for s in stages)]]
    for name in names:
        rows.append([name, *(shown(r) if (r := results_by_stage[s].get(name)) else "-" for s in stages)])
    cores = [chatcore(results_by_stage[s]) for s in stages]
    if any(cores):
        rows.append(["ChatCORE", *(_shown(*core) if core else "-" for core in cores)])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first being the head, as a Markdown table whose columns line up."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
