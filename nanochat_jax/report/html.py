"""Blocks as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

import hashlib
import os
import re
from html import escape
from pathlib import Path

from nanochat_jax.report.blocks import (
    ABSENT,
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
from nanochat_jax.report.plots import dots_svg, plot_svg

STYLE = Path(__file__).with_name("style.css")


def render(card: ReportCard) -> str:
    """The whole card as one page."""
    sections = [b for b in card.blocks if isinstance(b, Section)]
    links = "".join(f'<a href="#{_anchor(s)}">{escape(s.title)}</a>' for s in sections)
    body = "\n".join(_block(b) for b in card.blocks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(card.title)}: {escape(card.subtitle)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{escape(card.title)}</h1>
<p class="subtitle">{escape(card.subtitle)}</p>
<nav>{links}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")


def _block(block: Block) -> str:
    match block:
        case Section():
            inner = "\n".join(_block(b) for b in block.blocks)
            tag, name = f"h{block.level}", f' id="{_anchor(block)}"' if block.level == 2 else ""
            return f"<section{name}>\n<{tag}>{escape(block.title)}</{tag}>\n{inner}\n</section>"
        case Paragraph():
            return f"<p{' class=note' if block.note else ''}>{escape(block.text)}</p>"
        case Tiles():
            return f'<div class="tiles">{"".join(_tile(*tile) for tile in block.tiles)}</div>'
        case FactTable():
            rows = "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(f)}</dd></div>" for n, f in block.facts)
            return _folded(f'<dl class="facts">{rows}</dl>', block.fold)
        case Table():
            return _folded(_table(block), block.fold)
        case Plots():
            return f'<div class="plots">{"".join(_figure(p.title, plot_svg(p)) for p in block.plots)}</div>'
        case Dots():
            return _figure(block.title, dots_svg(block), "wide")
        case Samples():
            return _samples(block)
        case Quotes():
            return _folded("".join(_quote(title, text) for title, text in block.quotes), block.fold)
        case Code():
            return f"<pre class=code><code>{escape(block.text)}</code></pre>"


def _figure(title: str, svg: str, style: str = "") -> str:
    """A drawing with a name for those who cannot see it, and ids that no other drawing of the page has."""
    prefix = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", svg)
    svg = svg.replace("<svg ", f'<svg aria-label="{escape(title)}" ', 1)
    return f'<figure class="{style}"><figcaption>{escape(title)}</figcaption>{svg}</figure>'


def _quote(title: str, text: str) -> str:
    note = f'<p class="note">{escape(title)}</p>' if title else ""
    return f'<div class="quote">{note}<pre>{escape(text)}</pre></div>'


def _tile(label: str, value: str, remark: str) -> str:
    note = f"<small>{escape(remark)}</small>" if remark else ""
    return f'<div class="tile"><span>{escape(label)}</span><strong>{escape(value)}</strong>{note}</div>'


def _table(block: Table) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in block.header)
    body = "".join(f"<tr><th>{escape(row[0])}</th>{''.join(map(_cell, row[1:]))}</tr>" for row in map(list, block.rows))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    value, _, second = text.partition("\n")
    small = f"<small>{escape(second)}</small>" if second else ""
    return f"<td{' class=absent' if text == ABSENT else ''}>{escape(value)}{small}</td>"


def _samples(block: Samples) -> str:
    """Pairs side by side; what both texts begin with (the prompt) is set back."""
    labels = f"<p>{escape(block.before)}</p>" if block.before else ""
    rows = [f'<div class="pair labels">{labels}<p>{escape(block.after)}</p></div>']
    for before, after in block.pairs:
        if not block.before:
            rows.append(f'<div class="pair"><pre>{escape(after)}</pre></div>')
            continue
        common = len(os.path.commonprefix([before, after]))
        cells = "".join(
            f"<pre><span class=prompt>{escape(t[:common])}</span>{escape(t[common:])}</pre>" for t in (before, after)
        )
        rows.append(f'<div class="pair">{cells}</div>')
    return f'<div class="samples{"" if block.before else " single"}">{"".join(rows)}</div>'


def _folded(body: str, title: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if title else body
