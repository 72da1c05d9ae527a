"""What a person sees of long work: a live bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

LINE_EVERY_S = 10.0  # without a terminal: often enough to see life, rare enough to keep a log readable


class Live:
    """A bar with `what` before it, `count` and a text behind; a context manager.

    count: how far it is, as rich's columns write it ("{task.completed}/{task.total}").
    """

    def __init__(self, what: str, count: str, total: float | None = None, done: float = 0, transient: bool = False):
        self._live, self._began = sys.stdout.isatty(), time.monotonic()
        self._last_line = self._began
        columns = (TextColumn(what), BarColumn(), TextColumn(count), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=Console(), transient=transient)
        self._task = self._bar.add_task("", total=total, completed=done)  # pyright: ignore[reportArgumentType]

    def __enter__(self):
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._live:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def left(self, share_done: float) -> str:
        """How long the rest takes at the present pace; "?" at first."""
        if not share_done > 0:
            return "?"
        return time_left((time.monotonic() - self._began) * (1 - share_done) / share_done)

    def show(self, done: float, text: str, line: str, total: float | None = None, now: bool = False) -> None:
        """`done` and `text` on the bar; without a terminal `line` and `text`, every ten seconds unless `now`."""
        if self._live:
            self._bar.update(self._task, total=total, completed=done, description=text)  # total None: as it was
        elif now or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(f"{line} | {text}", flush=True)


class Progress(Live):
    """Training steps `start` .. `total`."""

    def __init__(self, total: int, start: int = 0):
        super().__init__("step", "{task.completed}/{task.total}", total, start)
        self._total = total

    def step(self, record: dict, smooth_loss: float, seconds_left: float) -> None:
        """Shows the record of a finished step."""
        done = record["step"] + 1
        parts = [f"loss {smooth_loss:.4f}"]
        parts += [f"reward {record['reward']:.3f}"] if "reward" in record else []
        parts += [f"lr x{record['lr_multiplier']:.3f}"] if "lr_multiplier" in record else []
        parts += [f"{record['tok_per_sec']:,.0f} tok/s"]
        parts += [f"mfu {100 * record['mfu']:.1f}%"] if "mfu" in record else []
        parts += [f"data wait {100 * record['data_wait']:.1f}%", f"left {time_left(seconds_left)}"]
        line = f"step {done}/{self._total} ({100 * done / self._total:.1f}%)"
        self.show(done, " | ".join(parts), line, now=done == self._total)


class RowsProgress(Live):
    """Building rows, `total` of them where that is known: call it with (rows, tokens, documents)."""

    def __init__(self, what: str, total: int | None):
        super().__init__(what, "{task.completed:,}" + ("/{task.total:,}" if total else ""), total)
        self._what, self._total = what, total

    def __call__(self, rows: int, tokens: int, documents: int) -> None:
        rate = tokens / max(time.monotonic() - self._began, 1e-9)
        text = f"{documents:,} documents, {rate:,.0f} tok/s"
        if not self._total:
            return self.show(rows, text, f"{self._what}: {rows:,}")
        self.show(rows, f"{text}, left {self.left(rows / self._total)}", f"{self._what}: {rows:,}/{self._total:,}")


class ShareProgress(Live):
    """Work of which a share is done: call it with (what is being worked on, share from 0 to 1)."""

    def __init__(self, what: str):
        super().__init__(what, "{task.percentage:.0f}%", 1.0)
        self._what = what

    def __call__(self, label: str, share: float) -> None:
        self.show(share, f"{label}, left {self.left(share)}", f"{self._what}: {100 * share:.0f}%")


class ProblemsProgress(Live):
    """Problems of an evaluation: call it with (done, total, accuracy so far)."""

    def __init__(self, name: str):
        super().__init__(name, "{task.completed}/{task.total}", transient=True)
        self._name = name

    def __call__(self, done: int, total: int, accuracy: float) -> None:
        text = f"accuracy {accuracy:.4f}, left {self.left(done / max(total, 1))}"
        self.show(done, text, f"{self._name}: {done:,}/{total:,}", total)


def duration(seconds: float) -> str:
    """1h02m, 3m04s, 42s or, below ten seconds, 5.3s."""
    return f"{seconds:.1f}s" if seconds < 9.95 else time_left(seconds)


def time_left(seconds: float) -> str:
    """The same in whole seconds throughout, as becomes an estimate."""
    s = round(seconds)
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


class Smoothed:
    """The reference's displayed loss: an average with weight 0.9 on the past, corrected for its start at zero."""

    def __init__(self, losses: list[float]):
        self._total, self._steps = 0.0, 0
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> float:
        self._steps += 1
        self._total = 0.9 * self._total + 0.1 * loss
        return self._total / (1 - 0.9**self._steps)


class Clock:
    """Time per step and the share of it spent waiting for data."""

    def __init__(self):
        self.seconds: deque[float] = deque(maxlen=50)
        self._mark = self._wait_mark = time.perf_counter()
        self._waited = 0.0

    def restart(self) -> None:
        self._mark, self._waited = time.perf_counter(), 0.0

    def wait_begins(self) -> None:
        self._wait_mark = time.perf_counter()

    def wait_ends(self) -> None:
        self._waited += time.perf_counter() - self._wait_mark

    def lap(self) -> tuple[float, float]:
        """(seconds since the last lap, of which waiting for data)."""
        now = time.perf_counter()
        seconds, waited = now - self._mark, self._waited
        self._mark, self._waited = now, 0.0
        self.seconds.append(seconds)
        return seconds, min(waited, seconds)
