"""python -m scripts.report: writes the card of a chain of runs and prints its summary."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.hardware import devices
from nanochat_jax.report import card, collect, html, markdown
from nanochat_jax.report.collect import ReportError
from nanochat_jax.report.summary import summary
from nanochat_jax.utils import errors, flags, paths
from nanochat_jax.utils.flags import flag


@dataclass(frozen=True)
class ReportSettings:
    """Flags of scripts.report."""

    runs: str = flag(
        "", "runs to report on, comma-separated; default: the newest run of the last stage, with its parents"
    )
    price_per_hour: float | None = flag(None, "dollars for an hour of the whole machine; default: known GPU rates")
    out: Path | None = flag(None, "folder for report.md and report.html; default: report/ in the base directory")


def write(settings: ReportSettings) -> tuple[Path, Path]:
    """Writes report.md and report.html, prints the summary table, returns both paths.

    Raises ReportError if there is nothing to report on, ResultError for a damaged evaluation.
    """
    if settings.price_per_hour is not None and settings.price_per_hour < 0:
        raise ReportError(f"--price_per_hour={settings.price_per_hour:g} must not be negative")
    names = [name.strip() for name in settings.runs.split(",") if name.strip()]
    left_out: list[str] = []
    if not names:
        names, left_out = collect.find_chain()
    runs = collect.load(names)
    content = card.build(runs, settings.price_per_hour, left_out)
    folder = settings.out or paths.base_dir() / "report"
    markdown_path, html_path = folder / "report.md", folder / "report.html"
    paths.write_atomic(markdown_path, markdown.render(content))
    paths.write_atomic(html_path, html.render(content))
    print(f"report on {' -> '.join(run.name for run in runs)}")
    for remark in card.remarks(runs, left_out):
        print(f"note: {remark}")
    table = card.summary_table(runs, summary(runs))
    print(in_lines([table.header, *table.rows]))
    print(f"written: {markdown_path} and {html_path}")
    return markdown_path, html_path


def in_lines(rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    lines = [[cell.replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(argv: list[str]) -> int:
    """Exit status: 0 written, 1 nothing to report on, 2 bad flags."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = flags.parse(ReportSettings, argv, __doc__ or "")

    def action() -> None:
        devices.prepare("cpu")  # counting parameters must not take a GPU from a run that is still going
        write(settings)

    return errors.exit_status(action)
