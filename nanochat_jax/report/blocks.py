"""What a report is made of, free of any markup: each renderer turns the same blocks into its own language.

All text in blocks is plain. Renderers escape it, so that nothing a model wrote can become markup.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """A heading with its blocks; `level` 2 is a chapter, 3 a part of one."""

    title: str
    blocks: Sequence["Block"]
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph. `note` is set in small print."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Tiles:
    """The few numbers that say it all: (label, value, remark)."""

    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class FactTable:
    """Name and value, one a line. `fold` gives them a title to unfold, where there are many."""

    facts: Sequence[tuple[str, str]]
    fold: str = ""


@dataclass(frozen=True)
class Table:
    """The first column holds names, the others values. A newline in a cell puts a second line into it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    fold: str = ""


@dataclass(frozen=True)
class Series:
    """A named curve. `kind`: "line", "points" (joined marks) or "noisy" (drawn faint under its moving average)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "line"
    low: Sequence[float] = ()  # of an interval at every point, or empty
    high: Sequence[float] = ()


@dataclass(frozen=True)
class LinePlot:
    """Curves over the step in one pair of axes."""

    title: str
    series: Sequence[Series]
    x_label: str = "step"
    marks: Sequence[float] = ()  # steps with a vertical line, named in the legend
    marks_name: str = ""


@dataclass(frozen=True)
class Plots:
    """Plots side by side where the page is wide enough."""

    plots: Sequence[LinePlot]


@dataclass(frozen=True)
class Dots:
    """Accuracies with their intervals, a line for every metric, a mark for every stage, a tick at chance."""

    title: str
    metrics: Sequence[str]
    stages: Sequence[str]
    values: Sequence[Sequence[tuple[float, float | None, float | None] | None]]  # by metric, then by stage
    chance: Sequence[float | None] = field(default=())


@dataclass(frozen=True)
class Samples:
    """What a model wrote before and after: pairs of texts under two labels."""

    before: str
    after: str
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Quotes:
    """Longer texts, each under a title."""

    quotes: Sequence[tuple[str, str]]
    fold: str = ""


@dataclass(frozen=True)
class Code:
    """Commands, verbatim."""

    text: str


Block = Section | Paragraph | Tiles | FactTable | Table | Plots | Dots | Samples | Quotes | Code


@dataclass(frozen=True)
class ReportCard:
    """The whole report."""

    title: str
    subtitle: str
    blocks: Sequence[Block]


ABSENT = "–"
MAX_CHARACTERS = 1500  # of one text by a model; longer ones are cut, visibly


def number(value: float | int | None) -> str:
    """Four significant digits for a float (zeros beyond the fourth decimal are left out), all digits for an integer,
    thousands separated; "–" for None."""
    if value is None:
        return ABSENT
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.3e}"
    if abs(value) >= 1000:
        return f"{float(f'{value:.4g}'):,.0f}"
    text = f"{value:#.4g}".rstrip(".")
    decimals = len(text.partition(".")[2])
    return text[: len(text) - min(decimals - 4, len(text) - len(text.rstrip("0")))] if decimals > 4 else text


def interval(low: float | None, high: float | None) -> str:
    """[low, high], or nothing where there is no interval."""
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def count_of(n: int, noun: str) -> str:
    """1 session, 2 sessions."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def clean(text: object, limit: int | None = MAX_CHARACTERS) -> str:
    """Text by a model made fit to be shown: what no reader can see or that rearranges what it sees (control characters,
    lone surrogates, direction overrides) becomes U+FFFD, and too long a text is cut with a remark."""
    string = str(text)
    kept = "".join("\ufffd" if _unprintable(c) else c for c in string[:limit])
    cut = len(string) - len(kept)
    return kept + (f" … ({cut:,} more characters)" if cut else "")


def _unprintable(c: str) -> bool:
    if c in "\n\t\u200c\u200d":  # the joiners are part of scripts and emoji
        return False
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not "\U000e0020" <= c <= "\U000e007f"
