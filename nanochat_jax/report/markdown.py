"""Blocks as one Markdown file (GitHub's dialect). Curves are lines of bars; the plots are in the HTML page."""

import html
import re

from nanochat_jax.report.blocks import (
    Block,
    Code,
    Dots,
    FactTable,
    Paragraph,
    Plots,
    Quotes,
    ReportCard,
    Samples,
    Section,
    Table,
    Tiles,
)
from nanochat_jax.report.plots import sparkline


def render(card: ReportCard) -> str:
    """The whole card as Markdown."""
    parts = [f"# {plain(card.title)}", plain(card.subtitle), *(_block(b) for b in card.blocks)]
    return "\n\n".join(p for p in parts if p) + "\n"


def escape(text: str) -> str:
    """Text that shows as it is written: no markup, no HTML, no links, in any place of a line, also in a table."""
    text = re.sub(r"([\\`*_{}\[\]()#+\-.!|~$])", r"\\\1", html.escape(text, quote=False))
    text = text.replace("://", "&#58;//").replace("@", "&#64;").replace("www\\.", "www&#46;")
    return text.replace("\t", " ").replace("\n", "<br>")


def plain(text: str) -> str:
    """Our own text: only what would be taken for markup is escaped, so that the file reads well as it stands."""
    text = html.escape(text, quote=False)
    return re.sub(r"([\\`*_|~$\[\]])", r"\\\1", text).replace("\n", "<br>")


def table(block: Table) -> str:
    """A table whose columns line up in the file too."""
    rows = [[plain(cell) for cell in row] for row in (block.header, *block.rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = [_row(row, widths) for row in rows]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([lines[0], _row(rule, widths), *lines[1:]])


def _row(cells: list[str], widths: list[int]) -> str:
    first, *rest = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
    return "| " + " | ".join([first, *rest]) + " |"


def _block(block: Block) -> str:
    match block:
        case Section():
            inner = [_block(b) for b in block.blocks]
            return "\n\n".join([f"{'#' * block.level} {plain(block.title)}", *(b for b in inner if b)])
        case Paragraph():
            return f"*{plain(block.text)}*" if block.note else plain(block.text)
        case Tiles():
            remarks = [f" ({plain(remark)})" if remark else "" for _, _, remark in block.tiles]
            lines = [f"* **{plain(v)}** {plain(n)}{r}" for (n, v, _), r in zip(block.tiles, remarks, strict=True)]
            return "\n".join(lines)
        case FactTable():
            return _folded("\n".join(f"* {plain(name)}: {plain(fact)}" for name, fact in block.facts), block.fold)
        case Table():
            return _folded(table(block), block.fold)
        case Plots():
            rows = [
                (p.title if len(p.series) == 1 else f"{p.title}: {s.name}", sparkline(s))
                for p in block.plots
                for s in p.series
            ]
            width = max((len(name) for name, _ in rows), default=0)
            return _fence("\n".join(f"{name.ljust(width)}  {bars}" for name, bars in rows)) if rows else ""
        case Dots():
            return ""  # the table above holds the same numbers
        case Samples():
            labels = [block.before, block.after] if block.before else [block.after]
            lines = ["| " + " | ".join(map(plain, labels)) + " |", "|" + " --- |" * len(labels)]
            for pair in block.pairs:
                cells = pair if block.before else pair[1:]
                lines.append("| " + " | ".join(map(escape, cells)) + " |")
            return "\n".join(lines)
        case Quotes():
            parts = [f"{escape(title)}\n\n{_fence(text)}" if title else _fence(text) for title, text in block.quotes]
            return _folded("\n\n".join(parts), block.fold)
        case Code():
            return _fence(block.text, "bash")


def _folded(body: str, title: str) -> str:
    if not title or not body:
        return body
    return f"<details><summary>{html.escape(title)}</summary>\n\n{body}\n\n</details>"


def _fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
