"""The commands that made the runs, with every setting spelled out, so that changed defaults do not change them."""

import shlex
from typing import Any

from nanochat_jax.model import gpt
from nanochat_jax.report.collect import Run
from nanochat_jax.runs import checkpoint

# How a run is watched, kept and continued, not what it computes.
_LEFT_OUT = {"run_name", "resume", "keep", "sinks", "source"}


def parameters(meta: dict[str, Any]) -> int | None:
    """Number of parameters of a run, None for a config that this version does not know."""
    try:
        return gpt.num_params(checkpoint.config_from_dict(meta["config"]))
    except (checkpoint.CheckpointError, KeyError, TypeError, ValueError):
        return None


def commands(runs: list[Run]) -> str:
    """Shell commands from the tokenizer to the report."""
    lines = []
    if runs[0].stage == "base" and runs[0].tokenizer:
        lines.append(_tokenizer(runs[0]))
    for run in runs:
        lines.append(_train(run))
        tasks = sorted(run.newest_results)
        if tasks:
            lines.append(_command("scripts.eval", [f"--source={run.stage}", f"--tasks={','.join(tasks)}"]))
    lines.append(_command("scripts.report", [f"--runs={','.join(run.name for run in runs)}"]))
    return "\n".join(lines)


def _tokenizer(run: Run) -> str:
    t, settings = run.tokenizer, run.meta.get("settings", {})
    flags = [f"--{k}={t[k]}" for k in ("max_chars", "doc_cap") if k in t]
    flags.append(f"--vocab_size={t.get('requested_vocab_size', t['vocab_size'])}")
    return _command("scripts.tok_train", [*_data(settings), *flags])


def _data(settings: dict) -> list[str]:
    if settings.get("demo"):
        return ["--demo"]
    return [f"--data={settings['data']}"] if settings.get("data") else []


def _train(run: Run) -> str:
    if run.meta.get("imported"):
        return _command("scripts.import_checkpoint", ["PATH", f"--run_name={run.name}"])
    flags = [f"--stage={run.stage}", f"--run_name={run.name}"]
    if parent := (run.meta.get("parent") or {}).get("run"):
        flags.append(f"--source={parent}")
    for key, value in run.meta.get("settings", {}).items():
        if key not in _LEFT_OUT and value not in ("", None):
            flags.append(f"--{key}={value}")
    return _command("scripts.train", flags)


def _command(module: str, flags: list[str], width: int = 100) -> str:
    """One command, wrapped with backslashes."""
    lines = [f"python -m {module}"]
    for flag in map(shlex.quote, flags):
        if len(lines[-1]) + 1 + len(flag) > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {flag}"
    return "\n".join(lines)
