"""A skipped step, computed again on any machine: the loss of every row, gradient norms, and the text of the worst rows.

    python -m scripts.replay RUN [STEP] [--flag=value ...]

RUN is a run's name or the path of its folder; STEP defaults to the newest skipped step. A folder that was copied needs
only tokenizer.json and incidents/.
"""

import json
import math
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.hardware import devices
from nanochat_jax.runs import checkpoint
from nanochat_jax.training import anomalies
from nanochat_jax.utils import errors, flags
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.flags import flag


class ReplayError(UserError, ValueError):
    """There is nothing to replay; the message names what there is."""


@dataclass(frozen=True)
class ReplaySettings:
    """Flags of scripts.replay."""

    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "gpu"))
    compute_dtype: str = flag("", "arithmetic; default: that of the run's machine", choices=("", "float32", "bfloat16"))
    device_batch_size: int = flag(1, "rows computed at once")
    gradients: bool = flag(True, "also compute gradients (three times the work)")
    rows: int = flag(3, "how many of the worst rows are shown as text")
    characters: int = flag(600, "of each row's text; 0: all")


@dataclass(frozen=True)
class Incident:
    """What is kept of a skipped step: facts (see `incidents.keep`) and the batch, each array (rows, T)."""

    folder: Path
    facts: dict[str, Any]
    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Replay:
    """The numbers of a step: row_nats is the loss of each row per unit of weight, (rows,); gradients by parameter."""

    loss: float
    row_nats: np.ndarray
    grad_norm: float | None
    parameter_norms: dict[str, float]


def open_incident(run: str, step: int | None = None) -> Incident:
    """The incident of a step, or the newest. Raises ReplayError where there is none."""
    folder = Path(run) if Path(run).is_dir() else checkpoint.run_dir(run)
    known = anomalies.steps(folder)
    if not known:
        raise ReplayError(f"no step of {folder} was skipped (there is nothing in {folder / 'incidents'})")
    step = known[-1] if step is None else step
    if step not in known:
        raise ReplayError(f"step {step} of {folder} is not kept; skipped and kept are {', '.join(map(str, known))}")
    where = anomalies.folder(folder, step)
    try:
        facts = json.loads((where / "incident.json").read_text(encoding="utf-8"))
        with np.load(where / "batch.npz", allow_pickle=False) as batch:
            names = "inputs", "targets", "weights"
            inputs, targets, weights = (batch[k].reshape(-1, batch[k].shape[-1]) for k in names)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ReplayError(f"incident.json or batch.npz in {where} is damaged ({error}): delete {where}") from error
    return Incident(where, facts, inputs, targets, weights)


def replay(incident: Incident, settings: ReplaySettings) -> Replay:
    """Computes the step again, `device_batch_size` rows at a time."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from nanochat_jax.model.gpt import abstract
    from nanochat_jax.model.loss import target_weights, token_nll, weighted_nll
    from nanochat_jax.training.optim import global_norm

    facts = incident.facts
    config = checkpoint.config_from_dict(facts["meta"]["config"])
    native = "float32" if facts["backend"] == "cpu" else "bfloat16"
    config = dataclasses.replace(config, compute_dtype=settings.compute_dtype or native)
    source = incident.folder.parent / facts["params"] / "params"
    if not source.is_dir():
        raise ReplayError(f"{source} is missing: the disk had no room for the parameters, or they were removed")
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), abstract(config))
    params = checkpoint.load_tree(source, {"params": target})["params"]

    weights = np.asarray(target_weights(jnp.asarray(incident.targets), jnp.asarray(incident.weights)))
    total = float(weights.sum())  # not finite, perhaps: then so is the loss, as it was
    denominator = total if total and facts["meta"].get("normalize", True) else 1.0

    nats = jax.jit(lambda p, x, y, w: (token_nll(config, p, x, y) * w).sum(-1))
    gradient = jax.jit(lambda p, x, y, w: jax.value_and_grad(lambda p: weighted_nll(config, p, x, y, w))(p))
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    row_sums, loss, grads = [], 0.0, None
    for i in range(0, len(weights), settings.device_batch_size):
        part = slice(i, i + settings.device_batch_size)
        x, y, w = incident.inputs[part], incident.targets[part], weights[part]
        row_sums.append(np.asarray(nats(params, x, y, w)))
        if settings.gradients:
            with np.errstate(invalid="ignore"):
                w = w / np.float32(denominator)
            one, more = gradient(params, x, y, w)
            loss, grads = loss + float(one), more if grads is None else add(grads, more)
    sums = np.concatenate(row_sums)
    if grads is None:
        return Replay(float(sums.sum()) / denominator, _per_weight(sums, weights), None, {})
    norms = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.linalg.norm(leaf.astype(jnp.float32)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    return Replay(loss, _per_weight(sums, weights), float(global_norm(grads)), norms)


def _per_weight(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    magnitude = np.abs(weights).sum(-1)  # advantages may be negative
    with np.errstate(invalid="ignore"):
        return np.divide(sums, magnitude, out=np.zeros_like(sums), where=magnitude > 0)


def worst_rows(result: Replay, count: int) -> list[int]:
    """Rows in order of suspicion: those that are not finite, then by the size of their loss."""
    size = np.where(np.isfinite(result.row_nats), np.abs(result.row_nats), np.inf)
    return [int(i) for i in np.argsort(-size, kind="stable")[:count]]


def describe(incident: Incident, result: Replay, settings: ReplaySettings) -> str:
    """What `scripts.replay` prints."""
    from nanochat_jax.text.tokenizer import Tokenizer

    facts = incident.facts
    lines = [
        f"step {facts['step']} was skipped: {facts['reason']}",
        f"then (on {facts['backend']}):  loss {_number(facts['loss'])}, gradient norm {_number(facts['grad_norm'])}",
        f"replayed:        loss {_number(result.loss)}"
        + ("" if result.grad_norm is None else f", gradient norm {_number(result.grad_norm)}"),
    ]
    if result.parameter_norms:
        lines.append("gradient norm of each parameter:")
        width = max(map(len, result.parameter_norms))
        lines += [f"  {name:<{width}}  {_number(norm)}" for name, norm in result.parameter_norms.items()]
    tokenizer = Tokenizer.load(incident.folder.parent.parent)
    finite = np.isfinite(result.row_nats)
    middle = float(np.median(result.row_nats[finite])) if finite.any() else math.nan
    lines.append(f"{len(finite)} rows, {(~finite).sum()} of them not finite; the median loss of a row is {middle:.4f}")
    for row in worst_rows(result, settings.rows):
        text = tokenizer.decode([int(t) for t in incident.inputs[row]])
        cut = f" (the first {settings.characters} characters)" if 0 < settings.characters < len(text) else ""
        trained = int(((incident.weights[row] != 0) & (incident.targets[row] >= 0)).sum())
        lines.append(f"row {row}: loss {result.row_nats[row]:.4f} over {trained} tokens trained on{cut}")
        lines.append(f"  {text[: settings.characters or None]!r}")
    return "\n".join(lines)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 1 nothing to replay, 2 bad flags."""
    names = []
    while argv and not argv[0].startswith("-"):
        names.append(argv.pop(0))
    settings = flags.parse(ReplaySettings, argv, "python -m scripts.replay RUN [STEP]: computes a skipped step again")
    if not 1 <= len(names) <= 2 or (len(names) == 2 and not names[1].isdigit()):
        print("error: give a run, and a step if not the newest skipped one: scripts.replay RUN [STEP]", file=sys.stderr)
        return 2

    def action() -> None:
        incident = open_incident(names[0], int(names[1]) if len(names) == 2 else None)
        devices.prepare(settings.device)
        print(f"device: {devices.check(settings.device)}")
        print(describe(incident, replay(incident, settings), settings))

    return errors.exit_status(action)
