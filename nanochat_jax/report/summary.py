"""The summary table: every metric that exists, by stage, with its 95 % interval."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanochat_jax.evals import results
from nanochat_jax.report.collect import Run

PASS_AT = re.compile(r"pass@\d+")


@dataclass(frozen=True)
class Value:
    """A measured number with its 95 % interval, where it has one, and the step of the model it was measured on."""

    value: float
    low: float | None = None
    high: float | None = None
    step: int | None = None


@dataclass(frozen=True)
class Row:
    """A metric over the runs of the report, in their order; None where it was not measured."""

    metric: str
    values: tuple[Value | None, ...]
    chance: float | None = None
    accuracy: bool = False  # a rate between 0 and 1, of which more is better


def summary(runs: list[Run]) -> list[Row]:
    """Rows in the order they are shown: CORE, bits per byte, chat tasks, ChatCORE, other tasks, rewards."""
    kinds = {task: result["kind"] for run in runs for task, result in run.newest_results.items()}
    chat = [t for t in results.CHAT_BASELINES if t in kinds]
    rest = sorted(t for t in kinds if t not in chat)
    bpb = list(dict.fromkeys(k for run in runs for k in run.eval_keys() if "bpb" in k))
    passes = sorted({k for run in runs for k in run.eval_keys() if PASS_AT.fullmatch(k)}, key=lambda k: int(k[5:]))
    rows = [
        *(_task(t, runs) for t in rest if kinds[t] == "core"),
        *(_row(bpb_label(k), runs, lambda run, k=k: in_training(run, k)) for k in bpb),
        *(_task(t, runs) for t in rest if kinds[t] == "bpb"),
        *(_task(t, runs) for t in chat),
        _row("ChatCORE", runs, _chatcore),
        *(_task(t, runs) for t in rest if kinds[t] not in ("core", "bpb", "samples")),
        *(_pass_at(k, runs) for k in dict.fromkeys(passes[:1] + passes[-1:])),
    ]
    return [row for row in rows if any(row.values)]


def figure(result: results.Result) -> Value | None:
    """The one figure of a kept result, None where it has none."""
    value = results.value(result)
    return None if value is None else Value(float(value), *_pair(result.get("interval")), result.get("step"))


def in_training(run: Run, key: str) -> Value | None:
    """The newest value of a number that was evaluated during training."""
    found = [record for record in run.evals if key in record]
    if not found:
        return None
    return Value(float(found[-1][key]), *interval_in(found[-1], key), found[-1]["step"])


def interval_in(record: dict, key: str) -> tuple[float | None, float | None]:
    """The interval of a number in an evaluation record: [low, high] as KEY_interval, or KEY_low and KEY_high."""
    return _pair(record.get(f"{key}_interval", (record.get(f"{key}_low"), record.get(f"{key}_high"))))


def main_keys(run: Run) -> list[str]:
    """The numbers of a run's evaluations during training, without the limits of intervals; of pass@k the k that are
    powers of two, and the largest."""
    keys = run.eval_keys()
    ks = [int(k[5:]) for k in keys if PASS_AT.fullmatch(k)]
    left_out = {f"pass@{k}" for k in ks if k & (k - 1) and k != max(ks)}
    return [k for k in keys if not is_limit(k, keys) and k not in left_out]


def is_limit(key: str, keys: list[str]) -> bool:
    """Whether a number is only a limit of another one's interval."""
    return any(key in (f"{k}_low", f"{k}_high") for k in keys)


def stage_label(run: Run, runs: list[Run]) -> str:
    """BASE, MID, SFT, RL; with the run's name where a stage occurs twice."""
    label = run.stage.upper()
    return label if sum(r.stage == run.stage for r in runs) == 1 else f"{label} {run.name}"


def bpb_label(key: str) -> str:
    """ "val_bpb" is "bits per byte", "chat_bpb" is "bits per byte (chat)"."""
    return "bits per byte" if key == "val_bpb" else f"bits per byte ({key.replace('bpb', '').strip('_ ')})"


def _row(metric: str, runs: list[Run], value: Callable[[Run], Value | None], accuracy: bool = False) -> Row:
    return Row(metric, tuple(value(run) for run in runs), accuracy=accuracy)


def _pass_at(key: str, runs: list[Run]) -> Row:
    """pass@k of the questions of reinforcement learning. Its first evaluation, before any update, is of the parent."""
    values = [in_training(run, key) for run in runs]
    for run in runs:
        parent = run.meta.get("parent") or {}
        before = next((r for r in run.evals if r["step"] == 0 and key in r), None)
        for i, other in enumerate(runs):
            if before and values[i] is None and (other.name, other.step) == (parent.get("run"), parent.get("step")):
                values[i] = Value(float(before[key]), *interval_in(before, key), other.step)
    return Row(f"{key} (RL, held out)", tuple(values), accuracy=True)


def _task(task: str, runs: list[Run]) -> Row:
    found = [run.newest_results.get(task) for run in runs]
    chance = next((r["baseline"] for r in found if r and r.get("baseline") is not None), None)
    accuracy = any(r and "accuracy" in r and r["kind"] not in ("core", "bpb") for r in found)
    name = "bits per byte (evaluation)" if task == "bpb" else task
    return Row(name, tuple(figure(r) if r else None for r in found), chance, accuracy)


def _chatcore(run: Run) -> Value | None:
    """ChatCORE of the newest step at which all of its tasks were evaluated."""
    for step in sorted(run.kept, reverse=True):
        if (found := results.chatcore(run.kept[step])) is not None:
            return Value(found[0], *found[1], step)
    return None


def _pair(pair: Any) -> tuple[float | None, float | None]:
    if isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(p, int | float) for p in pair):
        return float(pair[0]), float(pair[1])
    return None, None
