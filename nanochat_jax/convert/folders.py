"""Folders of exported files: written whole or not at all, with hashes and a manifest that says what is in them."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from nanochat_jax.convert import InterchangeError
from nanochat_jax.utils import paths

MANIFEST, SUMS = "nanochat_jax.json", "SHA256SUMS"


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name `out` when the block has ended without an error.

    An existing `out` must be empty, or with `overwrite` be one that this function has made. Raises InterchangeError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise InterchangeError(f"{out} exists and is not empty: choose another folder, or add --overwrite")
        if not (out / MANIFEST).is_file():
            raise InterchangeError(f"{out} was not made by scripts.export (no {MANIFEST}): it is not overwritten")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("writing", "old"))
    temporary.mkdir()
    try:
        yield temporary
        _sums(temporary)
        paths.sync_tree(temporary)
        if out.exists():
            os.rename(out, old)
        os.rename(temporary, out)
        paths.sync_directory(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sums(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{paths.sha256_file(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    (folder / SUMS).write_text("".join(lines))


def verify(folder: Path) -> None:
    """Checks the files against SHA256SUMS, where there is one. Raises InterchangeError naming one that differs."""
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        path, inside = folder / name, PurePosixPath(name)
        # links are followed: the hub's cache is a folder of links to the files
        if inside.is_absolute() or ".." in inside.parts or not path.is_file():
            raise InterchangeError(f"{folder / SUMS} lists {name}, which is missing")
        if paths.sha256_file(path) != digest:
            raise InterchangeError(
                f"{path} is not the file that {SUMS} lists: damaged, or changed since (if so, delete {SUMS})"
            )


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of scripts.export; empty where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["config"], dict) or not isinstance(content["step"], int):
            raise TypeError("config and step are needed")
        if not isinstance(content["stage"], str) or not isinstance(content.get("settings", {}), dict):
            raise TypeError("stage and settings are needed")
        return content
    except (ValueError, KeyError, TypeError) as error:
        raise InterchangeError(f"{path} is damaged ({error})") from error


def take_path(argv: Sequence[str], name: str, switches: Sequence[str] = ()) -> list[str]:
    """Arguments with the first one that stands alone (no flag, no flag's value) written as --name=PATH."""
    rest = list(argv)
    for i, argument in enumerate(rest):
        before = rest[i - 1] if i else ""
        flag = before.removeprefix("--").replace("-", "_")
        is_value = before.startswith("--") and "=" not in before and flag not in switches
        if not argument.startswith("-") and not is_value:
            return [*rest[:i], f"--{name}={argument}", *rest[i + 1 :]]
    return rest
