"""What a person sees of a long run: a live bar on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

LINE_EVERY_S = 10.0  # without a terminal: often enough to see life, rare enough to keep a log readable


class Progress:
    """Shows training steps `start` .. `total`; a context manager."""

    def __init__(self, total: int, start: int = 0):
        self._total, self._live = total, sys.stdout.isatty()
        self._last_line = 0.0
        self._bar = Bar(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=Console(),
        )
        self._task = self._bar.add_task("", total=total, completed=start)

    def __enter__(self) -> "Progress":
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

    def step(self, record: dict, smooth_loss: float, seconds_left: float) -> None:
        done = record["step"] + 1
        parts = [f"loss {smooth_loss:.4f}"]
        parts += [f"lr x{record['lr_multiplier']:.3f}"] if "lr_multiplier" in record else []
        parts += [f"{record['tok_per_sec']:,.0f} tok/s"]
        parts += [f"mfu {100 * record['mfu']:.1f}%"] if "mfu" in record else []
        parts += [f"data wait {100 * record['data_wait']:.1f}%", f"left {duration(seconds_left)}"]
        text = " | ".join(parts)
        if self._live:
            self._bar.update(self._task, completed=done, description=text)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S or done == self._total:
            self._last_line = time.monotonic()
            print(f"step {done}/{self._total} ({100 * done / self._total:.1f}%) | {text}", flush=True)


def duration(seconds: float) -> str:
    """1h02m, 3m04s or 5s."""
    s = int(round(seconds))
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


class RowsProgress:
    """A bar for building `total` rows: call it with (rows, tokens, documents); a context manager."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._live = what, total, sys.stdout.isatty()
        self._began = self._last_line = time.monotonic()
        self._bar = Bar(
            TextColumn(what),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,}"),
            TextColumn("{task.description}"),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "RowsProgress":
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._live:
            self._bar.stop()

    def __call__(self, rows: int, tokens: int, documents: int) -> None:
        now = time.monotonic()
        rate = tokens / max(now - self._began, 1e-9)
        left = duration((self._total - rows) * (now - self._began) / max(rows, 1))
        text = f"{documents:,} documents, {rate:,.0f} tok/s, left {left}"
        if self._live:
            self._bar.update(self._task, completed=rows, description=text)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            print(f"{self._what}: {rows:,}/{self._total:,} | {text}", flush=True)
