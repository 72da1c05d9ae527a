"""The chat page: the files of page/ put together into one, served with a policy that lets nothing else run."""

import base64
import hashlib
import re
from importlib import resources

_BLOCK = r"<{tag}\b[^>]*>(.*?)</{tag}\s*>"


_STYLE = r'<link rel="stylesheet" href="(\w+\.css)">'
_SCRIPTS = r'(?:<script src="\w+\.js"></script>\n)+'


def load() -> tuple[bytes, str]:
    """(the page, its Content-Security-Policy): only its own inline scripts and styles, only this server."""
    html = re.sub(_STYLE, lambda link: f"<style>\n{_read(link[1])}</style>", _read("index.html"))
    html = re.sub(_SCRIPTS, _one_script, html)
    scripts, styles = _hashes(html, "script"), _hashes(html, "style")
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


def _read(name: str) -> str:
    return (resources.files("nanochat_jax.serve") / "page" / name).read_text(encoding="utf-8")


def _one_script(links: re.Match[str]) -> str:
    """The linked files as one script, in which each sees the functions of those that follow."""
    files = re.findall(r'src="(\w+\.js)"', links[0])
    return "\n".join(['<script>\n"use strict";', *map(_read, files)]) + "</script>\n"


def _hashes(html: str, tag: str) -> str:
    blocks = re.findall(_BLOCK.format(tag=tag), html, re.DOTALL | re.IGNORECASE)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
