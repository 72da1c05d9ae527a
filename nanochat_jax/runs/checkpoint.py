"""Checkpoints and run directories.

    <base>/runs/<run>/tokenizer.json            the tokenizer the run was trained with
    <base>/runs/<run>/metrics.jsonl             one line per logged step
    <base>/runs/<run>/checkpoints/00000200/     state/ (orbax arrays) + meta.json

A checkpoint is written under a temporary name and renamed when all of it is on disk, so one that can be seen is
complete. Arrays are stored in device-independent form: a run resumes on any number of devices.
"""

import functools
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from nanochat_jax.model.gpt import GPTConfig, Params, abstract
from nanochat_jax.parallel import multihost
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils import paths
from nanochat_jax.utils.errors import InputError, UserError

FORMAT = 1
_STEP = re.compile(r"\d{8}")
_RUN = re.compile(r"(?!\.)[A-Za-z0-9._-]+")
logger = logging.getLogger(__name__)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written, found or used; the message names the path and the remedy."""


def run_dir(run: str) -> Path:
    """The directory of a run name (not created)."""
    if not _RUN.fullmatch(run):
        raise InputError(f"run name {run!r} may hold only letters, digits, dots, dashes and underscores")
    return paths.runs_dir() / run


@contextmanager
def exclusive(run: Path) -> Iterator[Path]:
    """Holds a run's directory for this process, so that two trainings cannot write into one run.

    The lock ends with the process, however it ends. Raises CheckpointError if another process holds it.
    """
    if not multihost.is_main():  # the main process holds it for all
        yield run
        return
    try:
        lock = paths.lock_file(run.with_name(f".{run.name}.lock"), wait=False)
    except BlockingIOError:
        raise CheckpointError(
            f"another process is training the run in {run}; wait for it, stop it, or choose another --run_name"
        ) from None
    with lock:
        yield run


def step_dir(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if _STEP.fullmatch(p.name) and (p / "meta.json").is_file())


def save(run: Path, step: int, state: Any, meta: dict, keep: int = 2, keep_every: int = 0) -> Path:
    """Writes one checkpoint atomically, then drops all but the newest `keep` (0 keeps every one) and those of every
    `keep_every` steps.

    `state` is a tree of arrays, `meta` is JSON-able and must carry what `load_model` needs ("config", "stage",
    "tokenizer_hash"). Raises CheckpointError, with what is already saved untouched, if the disk is full or the write
    fails. All processes of a run call it.
    """
    return begin_save(run, step, state, meta, keep, keep_every)()


def begin_save(run: Path, step: int, state: Any, meta: dict, keep: int = 2, keep_every: int = 0) -> Callable[[], Path]:
    """Steps 1 and 2 of a save, after which the state may be overwritten; the returned function does the rest, in any
    thread. Nothing else may be saved to the run before that has ended.

    1. remove what an interrupted save left behind, check that the disk has space;
    2. orbax copies the arrays to the host and begins to write them under a temporary name;
    3. when they are written: checksums of all files into meta.json, everything flushed to disk;
    4. one rename makes the checkpoint visible: killed before it, the run resumes from the previous checkpoint;
    5. checkpoints beyond `keep` and `keep_every` are removed, each renamed away first.
    """
    final = step_dir(run, step)
    temporary = final.with_name(f".{final.name}.writing")
    main = multihost.is_main()
    if main:  # 1.
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(final.parent)
        _check_free_space(run, state)
    multihost.barrier(f"save {step}")
    try:  # 2.
        writing = ocp.save_async(str(temporary / "state"), state)
    except Exception as error:
        raise _failed(run, step, temporary, error) from error

    def finish() -> Path:
        try:
            writing.result()
            if main:
                _publish(run, step, temporary, meta)  # 3. and 4.
                _drop_old(run, keep, keep_every)  # 5.
        except Exception as error:
            raise _failed(run, step, temporary, error) from error
        return final

    return finish


def _publish(run: Path, step: int, temporary: Path, meta: dict) -> None:
    """Makes a written checkpoint visible, once all of it is on disk."""
    final = step_dir(run, step)
    document = {"format": FORMAT, "step": step, **meta, "files": checksums(temporary)}
    paths.write_atomic(temporary / "meta.json", json.dumps(document, indent=2))
    paths.sync_tree(temporary)
    _remove(final)  # the same step saved again (for instance the last one, after a resume)
    os.rename(temporary, final)
    paths.sync_directory(final.parent)


def _failed(run: Path, step: int, temporary: Path, error: Exception) -> CheckpointError:
    shutil.rmtree(temporary, ignore_errors=True)
    return CheckpointError(
        f"saving step {step} to {step_dir(run, step)} failed: {error}. {_last_good(run)} Free some space or fix the "
        "cause, then run the same command again."
    )


def checksums(folder: Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of every file below a folder, by its path in there. About 3 GB/s and thread."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(4) as pool:
        sums = pool.map(crc32, files)
        return {
            str(p.relative_to(folder)): {"size": p.stat().st_size, "crc32": crc}
            for p, crc in zip(files, sums, strict=True)
        }


def crc32(path: Path) -> int:
    """CRC-32 of a file: enough against damage, and cheap."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _drop_old(run: Path, keep: int, keep_every: int) -> None:
    for old in steps(run)[:-keep] if keep else []:
        if not (keep_every > 0 and old % keep_every == 0):
            _remove(step_dir(run, old))


def _remove(folder: Path) -> None:
    """Removes a checkpoint, which is at no moment seen half removed."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.removing")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        shutil.rmtree(aside)


def _remove_unfinished(folder: Path) -> None:
    for leftover in (*folder.glob(".*.writing"), *folder.glob(".*.removing")):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_free_space(run: Path, state: Any) -> None:
    need = int(1.02 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))) + (1 << 20)
    free = shutil.disk_usage(run).free
    if free < need:
        raise CheckpointError(
            f"a checkpoint needs {need / 1e6:,.0f} MB but the disk of {run} has {free / 1e6:,.0f} MB free. "
            f"{_last_good(run)} Free some space, then run the same command again."
        )


def _last_good(run: Path) -> str:
    done = steps(run)
    return f"The last good checkpoint is {step_dir(run, done[-1])}." if done else "No earlier checkpoint exists."


def load_meta(run: Path, step: int | None = None) -> dict:
    """The meta.json of a step (default: the newest), checked for completeness."""
    available = steps(run)
    if not available:
        raise CheckpointError(f"no checkpoint in {run / 'checkpoints'}")
    if step is None:
        step = available[-1]
    if step not in available:
        raise CheckpointError(f"{run} has no checkpoint of step {step}; it has {available}")
    folder = step_dir(run, step)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] == FORMAT and not isinstance(meta["files"], dict):
            raise TypeError("files are needed")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(run, step, "meta.json") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {meta.get('format')}, this version reads {FORMAT}")
    for name, saved in meta["files"].items():
        size = saved["size"] if isinstance(saved, dict) else saved  # a plain number: saved before there were checksums
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise _damaged(run, step, name)
    return meta


def verify(run: Path, step: int, meta: dict) -> None:
    """Reads every file of a checkpoint and compares checksums. Raises CheckpointError naming the file that differs and
    the previous checkpoint."""
    names = [name for name, saved in meta["files"].items() if isinstance(saved, dict)]
    with ThreadPoolExecutor(4) as pool:
        for name, crc in zip(names, pool.map(lambda n: crc32(step_dir(run, step) / n), names), strict=True):
            if crc != meta["files"][name]["crc32"]:
                raise _damaged(run, step, name)


def _damaged(run: Path, step: int, name: str) -> CheckpointError:
    folder = step_dir(run, step)
    others = [s for s in steps(run) if s < step]
    hint = f"the previous checkpoint is step {others[-1]}" if others else "there is no earlier checkpoint"
    return CheckpointError(f"{folder / name} is missing or damaged; delete {folder} to resume: {hint}")


def restore(run: Path, step: int, target: Any) -> Any:
    """The saved tree in the structure, dtypes and shardings of `target` (jax.ShapeDtypeStruct leaves).

    Leaves of the saved tree that `target` leaves out are not loaded, but their bytes are checked too (`verify`).
    """
    if multihost.is_main():
        verify(run, step, load_meta(run, step))
    folder = step_dir(run, step) / "state"
    try:
        return load_tree(folder, target)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be read into this model: {error}") from error


def load_tree(folder: Path, target: Any) -> Any:
    """Arrays as orbax saved them, in the structure of `target`, which may leave some out."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(str(folder), target)


def find_run(run: str | None = None, stage: str | None = None) -> Path:
    """The directory of the named run, or of the most recently saved one (of `stage`, if given)."""
    if run is not None:
        if not steps(run_dir(run)):
            known = [p.name for p in run_folders()] or ["none"]
            raise CheckpointError(
                f"no checkpoint of a run named {run!r} in {paths.runs_dir()}; runs there: {', '.join(known)}"
            )
        return run_dir(run)
    found = _runs_of(stage)
    if not found:
        wanted = "model" if stage is None else f"{stage} model"
        raise CheckpointError(
            f"no trained {wanted} in {paths.runs_dir()}. Train one first: `bash speedrun_jax.sh`, or "
            "`python -m scripts.train --stage=base`."
        )
    return max(found, key=lambda p: (step_dir(p, steps(p)[-1]) / "meta.json").stat().st_mtime)


def _runs_of(stage: str | None) -> list[Path]:
    """All runs that have a checkpoint, or those of one stage."""
    return [p for p in run_folders() if not stage or load_meta(p)["stage"] == stage]


def run_folders() -> list[Path]:
    """The directories of all runs that have a checkpoint, by name. One whose name no run can have (a copy that a file
    manager has made) is left out, which is said once."""
    found = sorted(p for p in paths.runs_dir().glob("*") if not p.name.startswith(".") and steps(p))
    for folder in found:
        if not _RUN.fullmatch(folder.name):
            _leave_out(folder)
    return [p for p in found if _RUN.fullmatch(p.name)]


@functools.cache
def _leave_out(folder: Path) -> None:
    logger.warning(
        "%s is left out: a run's name holds only letters, digits, dots, dashes and underscores; rename it to use it",
        folder,
    )


def find_first(stages: tuple[str, ...]) -> Path:
    """The newest run of the first of `stages` that has any. Raises CheckpointError where none has."""
    for stage in stages[:-1]:
        try:
            return find_run(stage=stage)
        except CheckpointError:
            continue
    return find_run(stage=stages[-1])


def load_model(
    run: str | None = None, stage: str | None = None, step: int | None = None
) -> tuple[GPTConfig, Params, Tokenizer, dict]:
    """(config, params on the default device, tokenizer, meta) of a run, by default the newest one."""
    folder = find_run(run, stage)
    meta = load_meta(folder, step)
    config = config_from_dict(meta["config"])
    return config, load_params(folder, meta), load_tokenizer(folder, meta), {**meta, "run": folder.name}


def chosen(meta: dict[str, Any], run: str | None, stage: str | None) -> tuple[str, str]:
    """(which model was loaded and when it was saved; which others the flags could have meant, "" if none).

    meta: as `load_model` returns it; run, stage: the flags it was chosen by.
    """
    shown = f"{meta['run']}, stage {meta['stage']}, step {meta['step']}"
    with suppress(OSError):  # training may have replaced it meanwhile
        path = step_dir(run_dir(meta["run"]), meta["step"]) / "meta.json"
        shown += f", saved {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
    if run:
        return shown, ""
    n = len(_runs_of(stage))
    which = f"the newest of {n} {stage} runs" if stage else f"the newest of {n} runs"
    return shown, f"{which}: --run=NAME takes another, python -m scripts.models lists them" if n > 1 else ""


def load_params(folder: Path, meta: dict) -> Params:
    """The parameters of the checkpoint that `meta` describes, on the default device."""
    config = config_from_dict(meta["config"])
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), abstract(config))
    return restore(folder, meta["step"], {"params": target})["params"]


def load_tokenizer(run: Path, meta: dict) -> Tokenizer:
    """The run's own tokenizer, refused if it is not the one the checkpoint was trained with."""
    tokenizer = Tokenizer.load(run)
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise CheckpointError(
            f"{run / 'tokenizer.json'} has hash {tokenizer.hash[:12]}, but the checkpoint was trained with "
            f"{meta['tokenizer_hash'][:12]}: restore the original file or train a new run (--run_name)"
        )
    return tokenizer


def config_to_dict(config: GPTConfig) -> dict:
    return asdict(config)


def config_from_dict(saved: dict) -> GPTConfig:
    """The config of a checkpoint; how it is executed (dtype, kernels, rematerialisation) is this machine's choice."""
    known = {f.name for f in fields(GPTConfig)}
    unknown = set(saved) - known
    if unknown:
        raise CheckpointError(f"the checkpoint's config has fields this version does not know: {sorted(unknown)}")
    execution = ("compute_dtype", "attention", "remat", "fused")
    return GPTConfig(**{k: v for k, v in saved.items() if k not in execution})
