"""Runs as they lie on disk, read without touching a model: settings, metrics, evaluations, tokenizer, rows.

Everything here also works on a run that is still going, was stopped half way, or was never evaluated.
"""

import datetime
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_jax.evals import results
from nanochat_jax.evals.results import STAGES, Result
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.utils import paths
from nanochat_jax.utils.errors import UserError

logger = logging.getLogger(__name__)


class ReportError(UserError, RuntimeError):
    """There is nothing to report on, or not what was asked for; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """One run: `meta` is the newest checkpoint's, `records` are sorted out of metrics.jsonl by kind."""

    name: str
    folder: Path
    meta: dict[str, Any]
    saved: datetime.datetime  # when the newest checkpoint was written
    train: list[dict] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    sessions: list[dict] = field(default_factory=list)
    transcripts: list[dict] = field(default_factory=list)
    skips: list[dict] = field(default_factory=list)  # steps that were not trained on
    incidents: list[dict] = field(default_factory=list)  # memory that ran out, steps that hung
    kept: dict[int, dict[str, Result]] = field(default_factory=dict)  # results of scripts.eval: step -> task -> result
    tokenizer: dict[str, Any] = field(default_factory=dict)  # what tokenizer.json says of its training

    @property
    def stage(self) -> str:
        return self.meta["stage"]

    @property
    def step(self) -> int:
        """Updates in the newest checkpoint."""
        return self.meta["step"]

    @property
    def code(self) -> dict[str, Any]:
        """ "sha256", "commit" and "dirty" of the code that wrote the newest checkpoint; empty where nothing was
        recorded (imported models, old runs)."""
        code = self.meta.get("code")
        return code if isinstance(code, dict) else {}

    @property
    def planned_steps(self) -> int | None:
        """Updates the whole run is to have, where its identity says so."""
        planned = self.meta.get("identity", {}).get("num_iterations")
        return planned if isinstance(planned, int) and planned > 0 else None

    @property
    def finished(self) -> bool:
        return self.planned_steps is None or self.step >= self.planned_steps

    @property
    def train_seconds(self) -> float:
        """Seconds inside optimizer steps, as logged (rollouts included where the stage makes them)."""
        return sum(_numbers(self.train, "seconds"))

    @property
    def eval_seconds(self) -> float:
        """Seconds of evaluations during training and of those kept beside the run."""
        offline = [r["seconds"] for by_task in self.kept.values() for r in by_task.values() if "seconds" in r]
        return sum(_numbers(self.evals, "seconds")) + sum(offline)

    @property
    def newest_results(self) -> dict[str, Result]:
        """Task -> its result of the newest step that has one; those that were skipped only where there is no other."""
        merged: dict[str, Result] = {}
        for step in sorted(self.kept):
            for task, result in self.kept[step].items():
                if task not in merged or "skipped" not in result or "skipped" in merged[task]:
                    merged[task] = {"step": step, **result}
        return merged

    def eval_keys(self) -> list[str]:
        """Names of the numbers that evaluations during training gave, in order of appearance."""
        skip = {"kind", "step", "seconds"}
        return list(dict.fromkeys(k for r in self.evals for k, v in r.items() if k not in skip and _is_number(v)))


def curve(records: list[dict], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a number in records that have it; infinities and NaN cannot be drawn and are left out."""
    pairs = [(r["step"], float(r[key])) for r in records if _is_number(r.get(key))]
    return [float(s) for s, _ in pairs], [v for _, v in pairs]


def _numbers(records: list[dict], key: str) -> list[float]:
    return curve(records, key)[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def load_run(name: str) -> Run:
    """Reads one run. Raises ReportError if it has no checkpoint, naming the runs that do."""
    try:
        folder = checkpoint.run_dir(name)
    except ValueError as error:
        raise ReportError(f"--runs: {error}") from None
    if not checkpoint.steps(folder):
        known = [p.name for p in _run_folders()]
        started = " It has metrics, but was stopped before its first checkpoint." if folder.is_dir() else ""
        raise ReportError(
            f"no checkpoint of a run named {name!r} in {paths.runs_dir()}.{started} Runs with one: "
            f"{', '.join(known) or 'none'}"
        )
    meta, saved = _newest_meta(folder)
    records: dict[str, list[dict]] = {}
    for record in metrics.read(folder / "metrics.jsonl"):
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.setdefault(str(record.get("kind")), []).append(record)
    kinds = {"train": "train", "eval": "evals", "sample": "samples", "session": "sessions"}
    sorted_out = {field: records.get(kind, []) for kind, field in kinds.items()}
    return Run(
        name,
        folder,
        meta,
        saved,
        **sorted_out,
        transcripts=records.get("transcripts", []),
        skips=records.get("skip", []),
        incidents=records.get("incident", []),
        kept=_evaluations(folder),
        tokenizer=_tokenizer(folder),
    )


def find_chain() -> tuple[list[str], list[str]]:
    """(names from base on, runs left out that are newer): the newest run of the latest stage, and its parents.

    Raises ReportError when no run has a checkpoint.
    """
    folders = _run_folders()
    if not folders:
        raise ReportError(
            f"nothing to report: no run in {paths.runs_dir()} has a checkpoint. Train one first: `bash "
            "speedrun_jax.sh`, or `python -m scripts.train --stage=base`."
        )
    metas = {p.name: _newest_meta(p) for p in folders}
    name: str | None = max(metas, key=lambda n: (_order(metas[n][0]["stage"]), metas[n][1]))
    newest = metas[name][1]
    chain: list[str] = []
    while name is not None and name in metas and name not in chain:
        chain.insert(0, name)
        name = (metas[name][0].get("parent") or {}).get("run")
    if name is not None and name not in chain:
        logger.warning("the run %s, from which %s began, is not in %s any more", name, chain[0], paths.runs_dir())
    return chain, sorted(n for n, (_, saved) in metas.items() if n not in chain and saved > newest)


def load(names: list[str]) -> list[Run]:
    """The runs of these names, each once, sorted by stage."""
    runs = [load_run(name) for name in dict.fromkeys(names)]
    return sorted(runs, key=lambda run: _order(run.stage))


def _order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _run_folders() -> list[Path]:
    return checkpoint.run_folders()


def _newest_meta(folder: Path) -> tuple[dict, datetime.datetime]:
    """(meta.json of the newest checkpoint, when it was written). The arrays beside it are not looked at."""
    path = checkpoint.step_dir(folder, checkpoint.steps(folder)[-1]) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta["stage"], str) or not isinstance(meta["step"], int):
            raise TypeError("stage and step are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is damaged ({error}); delete {path.parent} to use the one before") from error
    return meta, datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)


def _evaluations(folder: Path) -> dict[int, dict[str, Result]]:
    return {step: results.load(folder, step) for step in results.steps(folder)}


def _tokenizer(folder: Path) -> dict[str, Any]:
    """The hash and training summary in the run's tokenizer.json, and compression figures made for the same hash."""
    content = _json(folder / "tokenizer.json")
    if not content:
        return {}
    found = {"hash": content.get("hash", ""), **content.get("training", {})}
    found.setdefault("vocab_size", len(content.get("ranks", ())) + len(content.get("special_tokens", ())))
    evaluation = _json(paths.base_dir() / "tokenizer" / "evaluation.json")
    if evaluation.get("tokenizer_hash") == found["hash"]:
        found["compression"] = evaluation
    return found


def rows_manifest(key: str) -> dict[str, Any]:
    """The manifest of the rows with this key, if they are still on this disk (else empty)."""
    for path in (paths.base_dir() / "rows").glob(f"*-{key[:12]}/manifest.json"):
        return _json(path)
    return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
