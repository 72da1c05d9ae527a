"""The chat page: one file of the package, served with a policy that lets nothing else run."""

import base64
import hashlib
import re
from importlib import resources

_BLOCK = r"<{tag}\b[^>]*>(.*?)</{tag}\s*>"


def load() -> tuple[bytes, str]:
    """(the page, its Content-Security-Policy): only its own inline scripts and styles, only this server."""
    html = (resources.files("nanochat_jax.serve") / "page" / "index.html").read_text(encoding="utf-8")
    scripts, styles = _hashes(html, "script"), _hashes(html, "style")
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


def _hashes(html: str, tag: str) -> str:
    blocks = re.findall(_BLOCK.format(tag=tag), html, re.DOTALL | re.IGNORECASE)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
