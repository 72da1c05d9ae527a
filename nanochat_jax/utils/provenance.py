"""Which code made it: the commit where there is one, and always a hash of the source itself."""

import hashlib
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nanochat_jax

PACKAGES = ("nanochat_jax", "tasks", "scripts", "rustbpe")
SUFFIXES = {".py", ".rs", ".toml", ".jinja", ".so", ".pyd"}


@dataclass(frozen=True)
class SourceCode:
    """The source as it lies on disk now."""

    sha256: str
    files: int
    lines: int
    characters: int
    commit: str  # "" outside a git repository
    dirty: bool  # files git knows differ from the commit


def source() -> SourceCode:
    """Hash and size of the package, the tasks and the tokenizer crate (installed: its library), and the commit.

    The hash covers names and contents in order, so equal hashes mean equal code. Never raises: without git, or outside
    a repository, there is no commit.
    """
    root = Path(nanochat_jax.__file__).parent.parent
    digest, files, lines, characters = hashlib.sha256(), 0, 0, 0
    for path in _source_files(root):
        data = path.read_bytes()
        name = path.relative_to(root).as_posix().encode()
        digest.update(len(name).to_bytes(4, "little") + name + len(data).to_bytes(8, "little") + data)
        if path.suffix in (".py", ".rs"):
            text = data.decode("utf-8", "replace")
            files, lines, characters = files + 1, lines + text.count("\n"), characters + len(text)
    commit = _git(root, "rev-parse", "HEAD")
    dirty = bool(commit and _git(root, "status", "--porcelain", "--untracked-files=no", "--", *PACKAGES))
    return SourceCode(digest.hexdigest(), files, lines, characters, commit, dirty)


def _source_files(root: Path) -> list[Path]:
    found = [p for name in PACKAGES for p in (root / name).rglob("*") if p.suffix in SUFFIXES and p.is_file()]
    return sorted(p for p in found if not {"target", "__pycache__"} & set(p.relative_to(root).parts))


def _git(root: Path, *arguments: str) -> str:
    if not (root / ".git").exists():  # installed somewhere below another project's repository
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def this_machine() -> str:
    """Where the report itself was made."""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
