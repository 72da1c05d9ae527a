"""What is on this disk: every run with its newest checkpoint, where it came from, what it was trained on, its scores.

python -m scripts.models            as a list; --json for programs
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.evals import results
from nanochat_jax.hardware import devices
from nanochat_jax.report.reproduce import parameters
from nanochat_jax.runs import checkpoint
from nanochat_jax.text.tokenizer import FILE_NAME
from nanochat_jax.utils import errors, flags, paths
from nanochat_jax.utils.flags import flag


@dataclass(frozen=True)
class ModelsSettings:
    """Flags of scripts.models."""

    run: str = flag("", "only this run")
    stage: str = flag("", "only runs of this stage")
    json: bool = flag(False, "one JSON object a line")


@dataclass(frozen=True)
class ListedRun:
    """One run. Hashes are whole; "" where nothing was recorded. problem: why it cannot be used, "" if it can."""

    run: str
    stage: str
    step: int
    planned: int | None
    steps: list[int]
    parameters: int | None
    bytes: int
    tokenizer: str
    data: str
    parent: str
    commit: str
    origin: str
    scores: dict[str, str]
    problem: str = ""


def models(run: str = "", stage: str = "") -> list[ListedRun]:
    """All runs with a checkpoint, the newest last. A damaged one is listed with its problem."""
    found = [p for p in checkpoint.run_folders() if run in ("", p.name)]
    found.sort(key=lambda p: (checkpoint.step_dir(p, checkpoint.steps(p)[-1]) / "meta.json").stat().st_mtime)
    listed = [_model(folder) for folder in found]
    return [model for model in listed if not stage or model.stage == stage]


def _model(folder: Path) -> ListedRun:
    done = checkpoint.steps(folder)
    size = sum(p.stat().st_size for p in (folder / "checkpoints").rglob("*") if p.is_file())
    try:
        meta = checkpoint.load_meta(folder)
    except (checkpoint.CheckpointError, ValueError, KeyError) as error:
        return ListedRun(folder.name, "?", done[-1], None, done, None, size, "", "", "", "", "", {}, str(error))
    identity, parent = meta.get("identity", {}), meta.get("parent") or {}
    code = meta.get("code") or {}
    imported = meta.get("imported") or {}
    return ListedRun(
        run=folder.name,
        stage=meta.get("stage", "?"),
        step=meta["step"],
        planned=identity.get("num_iterations"),
        steps=done,
        parameters=parameters(meta),
        bytes=size,
        tokenizer=meta.get("tokenizer_hash", ""),
        data=identity.get("rows") or identity.get("task") or "",
        parent=f"{parent['run']}@{parent['step']}" if parent else "",
        commit=(code.get("commit") or "") + ("+" if code.get("dirty") else ""),
        origin=f"{imported['kind']} files {imported['name']}" if imported else "",
        scores=_scores(folder, meta["step"]),
        problem=_problem(folder, meta),
    )


def _problem(folder: Path, meta: dict[str, Any]) -> str:
    """Another tokenizer, or none, in the run's folder."""
    try:
        recorded = json.loads((folder / FILE_NAME).read_text(encoding="utf-8")).get("hash", "")
    except (OSError, ValueError) as error:
        return f"{folder / FILE_NAME} cannot be read: {error}"
    wanted = meta.get("tokenizer_hash", "")
    if recorded != wanted:
        return f"its tokenizer.json is {recorded[:12]}, it was trained with {wanted[:12]}"
    return ""


def _scores(folder: Path, step: int) -> dict[str, str]:
    """The figures of the newest step that was evaluated, with their intervals."""
    try:
        done = results.steps(folder)
        if not done:
            return {}
        at = step if step in done else done[-1]
        kept = results.load(folder, at)
    except results.ResultError as error:
        return {"evaluations": str(error)}
    found = {name: results.shown(result) for name, result in kept.items() if result["kind"] != "samples"}
    if (core := results.chatcore(kept)) is not None:
        found["ChatCORE"] = f"{core[0]:.4f} [{core[1][0]:.4f}, {core[1][1]:.4f}]"
    return found if at == step else {f"{name} (step {at})": value for name, value in found.items()}


def shown(model: ListedRun) -> str:
    """A model in some lines, for people."""
    planned = f" of {model.planned:,}" if model.planned and model.planned > model.step else ""
    size = f"{model.parameters:,} parameters" if model.parameters else "unknown configuration"
    kept = f", steps kept: {', '.join(map(str, model.steps))}" if len(model.steps) > 1 else ""
    lines = [f"{model.run}  {model.stage}, step {model.step:,}{planned}, {size}, {model.bytes / 1e6:,.1f} MB{kept}"]
    facts = {
        "tokenizer": model.tokenizer[:12], "data": model.data[:12], "parent": model.parent, "commit": model.commit[:13],
        "imported from": model.origin,
    }  # fmt: skip
    lines.append("    " + "  ".join(f"{name} {value}" for name, value in facts.items() if value))
    lines += [f"    {name}: {value}" for name, value in model.scores.items()]
    if model.problem:
        lines.append(f"    cannot be used: {model.problem}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 listed, 1 nothing there, 2 bad flags."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = flags.parse(ModelsSettings, argv, __doc__ or "", echo=False)
    return errors.exit_status(lambda: _list(settings))


def _list(settings: ModelsSettings) -> int:
    devices.prepare("cpu")  # counting parameters must not take a GPU from a run that is still going
    if settings.run:
        checkpoint.run_dir(settings.run)  # refuses what is no run's name
    found = models(settings.run, settings.stage)
    if not found:
        what = " ".join(filter(None, (settings.stage, settings.run))) or "trained"
        print(
            f"no {what} model in {paths.runs_dir()}: train one (`bash speedrun_jax.sh`) or import one "
            "(`python -m scripts.import_checkpoint PATH`)",
            file=sys.stderr,
        )
        return 1
    for model in found:
        print(json.dumps(asdict(model)) if settings.json else shown(model))
    return 0
