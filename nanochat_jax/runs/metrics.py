"""The run's numbers: `metrics.jsonl` always, other sinks on request.

Kinds of records: "session" (a process began or resumed training: when, on what, with which versions), "train" (one a
step), "skip" (instead, for a step that was not trained on), "eval", "sample", "transcripts" (of rollouts), "incident"
(memory ran out, or a step hung). All have the step; a resumed run drops what it will write again.

A sink can be slow, hang or raise without stopping or slowing the run: records go through a bounded queue to a daemon
thread, and a sink that fails is reported once and dropped.
"""

import contextlib
import json
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from nanochat_jax.utils.errors import InputError, StorageError
from nanochat_jax.utils.paths import is_full, no_space, offline, write_atomic

logger = logging.getLogger(__name__)

Sink = Callable[[dict], None]


class MetricsLog:
    """Appends one JSON object per line to `path` and hands each to the optional sinks; writes nothing without a path
    (in all but one of several processes)."""

    def __init__(self, path: Path | None, sinks: dict[str, Sink] | None = None):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = open(path or os.devnull, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._sinks = [_BackgroundSink(name, sink) for name, sink in (sinks or {}).items()]

    def write(self, record: dict) -> None:
        """Raises OSError, naming the file and the remedy, where it cannot be written (a full disk: `no_space`)."""
        line = json.dumps(record) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # what is left in its buffer has nowhere to go
                self._file.close()
            if self._path is not None and is_full(error):
                raise no_space(self._path, error, len(line)) from error
            raise StorageError(
                f"{self._path} cannot be written ({error.strerror}). What the run saved last is whole: as soon as that "
                "disk takes it, the same command resumes from there"
            ) from error
        for sink in self._sinks:
            sink.put(record)

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()


class _BackgroundSink:
    def __init__(self, name: str, sink: Sink, backlog: int = 1000):
        self._name, self._sink, self._failed = name, sink, False
        self._queue: queue.Queue[dict | None] = queue.Queue(backlog)
        self._thread = threading.Thread(target=self._work, name=f"metrics-{name}", daemon=True)
        self._thread.start()

    def put(self, record: dict) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._give_up("it does not keep up")

    def close(self, timeout: float = 5.0) -> None:
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _give_up(self, why) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("metrics sink %s is switched off: %s (metrics.jsonl is still written)", self._name, why)

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._sink(record)
            except Exception as error:  # a sink must never stop a run, whatever it raises
                self._give_up(error)
                return


def read(path: Path) -> list[dict]:
    """All complete records of a metrics file; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def rewind(path: Path, step: int, keep_eval: bool) -> None:
    """Drops what a resumed run will write again: training records from `step` on, and evaluations after `step` (the
    one at `step` too, unless `keep_eval`). What is known of the sessions and of incidents stays. Where the disk is full
    the file is left as it was, and the OSError says so."""

    def kept(record):
        if record["kind"] in ("session", "incident") or record["step"] < step:
            return True
        return keep_eval and record["step"] == step and record["kind"] not in ("train", "skip", "transcripts")

    lines = [json.dumps(r) + "\n" for r in read(path) if kept(r)]
    if path.exists():
        write_atomic(path, "".join(lines))


def open_sinks(names: str, run: str, folder: Path, settings: dict) -> dict[str, Sink]:
    """The optional sinks of a comma-separated list ("wandb", "tensorboard"); one that cannot start is reported and
    left out."""
    makers = {"wandb": _wandb, "tensorboard": _tensorboard}
    sinks: dict[str, Sink] = {}
    for name in filter(None, (n.strip() for n in names.split(","))):
        if name not in makers:
            raise InputError(f"--sinks={name}: known sinks are {', '.join(makers)}")
        try:
            sinks[name] = makers[name](run, folder, settings)
        except ImportError as error:
            logger.warning("metrics sink %s cannot start (%s): pip install '.[%s]'", name, error, name)
        except Exception as error:  # no account, no network: the run continues without it
            logger.warning("metrics sink %s cannot start: %s", name, error)
    return sinks


def _wandb(run: str, folder: Path, settings: dict) -> Sink:
    import wandb  # pyright: ignore[reportMissingImports]

    limits = wandb.Settings(login_timeout=30, init_timeout=60)  # it asks for a key: a run must not wait for an answer
    mode = "offline" if offline() else None  # None: what WANDB_MODE says
    wandb.init(
        project="nanochat_jax", name=run, dir=str(folder), config=settings, resume="allow", id=run, mode=mode,
        settings=limits,
    )  # fmt: skip
    return lambda r: wandb.log({f"{r['kind']}/{k}": v for k, v in r.items() if k not in ("kind", "step")}, r["step"])


def _tensorboard(run: str, folder: Path, settings: dict) -> Sink:
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

    writer = SummaryWriter(str(folder / "tensorboard"))

    def sink(record: dict) -> None:
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    return sink
