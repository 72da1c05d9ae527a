"""CORE: the mean centred accuracy over the bundle's tasks, scored in full batches.

Centred accuracy is (accuracy - baseline) / (1 - baseline): 0 is guessing, 1 is perfect. Prompts, shots, spans and
decisions are the reference's, item by item (`core_prompts`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanochat_jax.evals import stats
from nanochat_jax.evals.core_bundle import Bundle, CoreTask
from nanochat_jax.evals.core_prompts import (
    LANGUAGE_MODELING,
    Item,
    NotAPrefixError,
    Spans,
    build_prompts,
    fewshot_indices,
    find_spans,
    item_order,
)
from nanochat_jax.evals.scorer import Scorer
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import InputError
from nanochat_jax.utils.progress import ShareProgress, duration

BLOCK = 1000  # items tokenized and scored at a time: bounds memory (ten shots before eleven options: 22 M tokens)


def centered(accuracy, baseline):
    """0 where accuracy is the baseline, 1 where it is 1; numbers or arrays of one shape."""
    return (accuracy - baseline) / (1 - baseline)


def evaluate_core(
    scorer: Scorer,
    tokenizer: Tokenizer,
    bundle: Bundle,
    *,
    max_per_task: int = -1,
    done: Mapping[str, dict[str, Any]] | None = None,
    save: Callable[[dict[str, Any]], Any] = lambda partial: None,
    progress: ShareProgress | None = None,
) -> dict[str, Any]:
    """The CORE metric and every task's result, one task after the other, so that an interruption costs one of them.

    max_per_task crops every task to so many items, which also changes their shots (as in the reference). done: results
    of tasks that an interrupted evaluation has saved. save is given what there is after each task but the last.

    Returns {"tasks": {label: as `evaluate_task`}, "n", "accuracy", "baseline", "centered" (the metric), "interval" (of
    the metric, 95 %, items resampled within tasks), "items"}; while tasks are missing, "skipped" in place of figures.
    Raises ValueError for a max_per_task that leaves too few items to show, before anything is run.
    """
    shots = max(task.num_fewshot for task in bundle.tasks)
    if 0 < max_per_task <= shots:
        raise InputError(
            f"--max_per_task={max_per_task} leaves no {shots} shots beside an item; use {shots + 1} or more"
        )
    found = dict(done or {})
    work = {task.label: _work(task, bundle.items(task), max_per_task) for task in bundle.tasks}
    for task in bundle.tasks:
        if task.label in found:
            continue
        before = sum(work[label] for label in found)

        def shown(fraction: float, task=task, before=before) -> None:
            if progress is not None:
                progress(task.label, (before + work[task.label] * fraction) / sum(work.values()))

        items = bundle.items(task)
        result = evaluate_task(scorer, tokenizer, task, items, item_order(len(items), max_per_task), progress=shown)
        found[task.label] = result
        if progress is not None:
            progress.say(_line(task.label, result))
        if len(found) < len(bundle.tasks):
            save(_metric(bundle, found))
    return _metric(bundle, found)


def _metric(bundle: Bundle, found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What `evaluate_core` returns for the tasks that are done."""
    parts = {task.label: found[task.label] for task in bundle.tasks if task.label in found}
    result = {"n": sum(part["n"] for part in parts.values()), "tasks": parts}
    if len(parts) < len(bundle.tasks):
        return {**result, "skipped": f"{len(parts)} of {len(bundle.tasks)} tasks are done; run it again to resume"}
    baselines = np.array([part["baseline"] for part in parts.values()])
    accuracies = np.array([part["accuracy"] for part in parts.values()])

    def metric(means: np.ndarray) -> np.ndarray:
        return centered(means, baselines).mean(-1)

    correct = [[item["correct"] for item in part["items"]] for part in parts.values()]
    return {
        **result,
        "accuracy": float(accuracies.mean()),
        "baseline": float(baselines.mean()),
        "centered": float(metric(accuracies)),
        "interval": list(stats.stratified_interval(correct, metric)),
        "items": [
            {"id": f"{label}/{item['id']}", "correct": item["correct"]}
            for label, part in parts.items()
            for item in part["items"]
        ],
    }


def evaluate_task(
    scorer: Scorer,
    tokenizer: Tokenizer,
    task: CoreTask,
    items: Sequence[Item],
    order: Sequence[int],
    *,
    progress=None,
) -> dict[str, Any]:
    """Evaluates `items[i] for i in order`; shots come from among them (`fewshot_indices`).

    Returns {"type", "num_fewshot", "accuracy", "centered", "interval" (of the accuracy), "baseline", "n",
    "unscored", "seconds", "items": [{"id": i, "correct": 0 or 1}, ...] in order}. An item whose span cannot be told
    apart in tokens counts as wrong and in "unscored"; the reference stops there.
    `progress(fraction)` is called as it goes.
    """
    began, shown = time.monotonic(), [items[i] for i in order]
    correct: list[bool] = []
    unscored = 0
    for at in range(0, len(shown), BLOCK):
        spans = _spans(tokenizer, task, shown, range(at, min(at + BLOCK, len(shown))))
        # An item whose options are all alike has its span begin at 0, where nothing comes before.
        rows = [(t, max(1, a), b) for s in spans if s for t, a, b in zip(s.tokens, s.starts, s.ends, strict=True)]

        def scored(done: int, total: int, at=at, spans=spans) -> None:
            if progress is not None:
                progress((at + len(spans) * done / total) / len(shown))

        found = iter(scorer.spans(rows, scored))
        for item, span in zip(shown[at:], spans, strict=False):
            unscored += span is None
            if span is None:
                correct.append(False)
            elif task.kind == LANGUAGE_MODELING:
                correct.append(next(found)[1])
            else:
                correct.append(_lowest([next(found)[0] for _ in span.tokens]) == item["gold"])
    accuracy = float(np.mean(correct))
    return {
        "type": task.kind,
        "num_fewshot": task.num_fewshot,
        "accuracy": accuracy,
        "centered": centered(accuracy, task.baseline),
        "interval": list(stats.bootstrap_interval(np.array(correct, np.float64))),
        "baseline": task.baseline,
        "n": len(correct),
        "unscored": unscored,
        "seconds": round(time.monotonic() - began, 3),
        "items": [{"id": int(i), "correct": int(right)} for i, right in zip(order, correct, strict=True)],
    }


def _spans(tokenizer: Tokenizer, task: CoreTask, items: Sequence[Item], indices: range) -> list[Spans | None]:
    """Tokens and spans of some of the items; None where they cannot be told apart."""
    prompts, sizes = [], []
    for index in indices:
        shots = [items[j] for j in fewshot_indices(len(items), index, task.num_fewshot)]
        own = build_prompts(task.kind, items[index], shots, task.delimiter)
        prompts += own
        sizes.append(len(own))
    flat, offsets = tokenizer.encode_to_numpy(prompts)
    rows = (flat[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True))
    out: list[Spans | None] = []
    for size in sizes:
        try:
            out.append(find_spans(task.kind, [next(rows) for _ in range(size)]))
        except NotAPrefixError:
            out.append(None)
    return out


def _lowest(losses: list[float]) -> int:
    """Index of the first lowest loss; NaN (an empty span) wins in first place only, as in the reference."""
    return min(range(len(losses)), key=losses.__getitem__)


def _work(task: CoreTask, items: Sequence[Item], max_items: int) -> float:
    """Roughly how much text a task makes the model read, for the time that is left: characters."""
    order = item_order(len(items), max_items)
    shown = [items[i] for i in order]
    sample = range(0, len(shown), max(1, len(shown) // 16))
    shots = [[shown[j] for j in fewshot_indices(len(shown), i, task.num_fewshot)] for i in sample]
    lengths = [max(map(len, build_prompts(task.kind, shown[i], s))) for i, s in zip(sample, shots, strict=True)]
    return float(np.mean(lengths) * len(shown))


def _line(label: str, result: dict[str, Any]) -> str:
    low, high = result["interval"]
    text = (
        f"{label} | accuracy {result['accuracy']:.4f} [{low:.4f}, {high:.4f}] | centered {result['centered']:.4f} | "
        f"{result['n']} items, {result['num_fewshot']}-shot {result['type'].replace('_', ' ')} | "
        f"{duration(result['seconds'])}"
    )
    return text + (f" | {result['unscored']} could not be scored, counted as wrong" if result["unscored"] else "")
