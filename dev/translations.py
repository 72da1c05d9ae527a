"""Keeps the book's translations in step with its text: python -m dev.translations [--write] [--build]; see --help.

The catalogues are docs/locale/LANGUAGE/LC_MESSAGES/**/*.po, one a page. Without flags: compares them with the text,
lists what is untranslated, fuzzy or left over, and ends with status 1 if anything is. Needs the extra "docs".
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.utils import errors
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.flags import flag, parse

ROOT = Path(__file__).parents[1]
DOCS, TEMPLATES = ROOT / "docs", ROOT / "docs" / "_build" / "gettext"
# What is translated: the parts for readers. The reference quotes docstrings and help texts, which are English.
PARTS = ("index", "tour", "book", "math", "howto")


class Untranslated(UserError, RuntimeError):
    """The catalogues are not complete; the message says which."""


@dataclass(frozen=True)
class TranslationSettings:
    """Flags."""

    write: bool = flag(False, "bring the catalogues up to date: new messages are added, empty; left-over ones removed")
    build: bool = flag(False, "build the translated book, too: docs/_build/html-LANGUAGE")
    language: str = flag("ja", "the language")


def main(argv: list[str]) -> int:
    settings = parse(TranslationSettings(), argv, f"python -m dev.translations: {__doc__}")
    return errors.exit_status(lambda: run(settings))


def run(settings: TranslationSettings) -> None:
    """Raises Untranslated, or CalledProcessError where Sphinx fails."""
    _sphinx("gettext", TEMPLATES)
    folder = DOCS / "locale" / settings.language / "LC_MESSAGES"
    problems = []
    for template in _templates():
        catalogue = folder / template.relative_to(TEMPLATES).with_suffix(".po")
        problems += _compare(template, catalogue, settings)
    for path in sorted(folder.rglob("*.po")):
        if not (TEMPLATES / path.relative_to(folder).with_suffix(".pot")).exists():
            problems.append(f"{path.relative_to(ROOT)}: there is no such page")
    if problems:
        raise Untranslated("\n".join([*problems, "update with: python -m dev.translations --write, then translate"]))
    print(f"{settings.language}: {len(_templates())} pages, every message translated")
    if settings.build:
        _sphinx("html", DOCS / "_build" / f"html-{settings.language}", "-D", f"language={settings.language}")


def _templates() -> list[Path]:
    return sorted(
        path for path in TEMPLATES.rglob("*.pot") if path.relative_to(TEMPLATES).parts[0].split(".")[0] in PARTS
    )


def _compare(template: Path, path: Path, settings: TranslationSettings) -> Iterator[str]:
    """What is wrong with a page's catalogue, which is brought up to date first if wanted."""
    from babel.messages.catalog import Catalog
    from babel.messages.pofile import read_po, write_po

    with template.open("rb") as file:
        wanted = read_po(file)
    catalogue = Catalog(settings.language)
    if path.exists():
        with path.open("rb") as file:
            catalogue = read_po(file, settings.language)
    if settings.write:
        catalogue.update(wanted, no_fuzzy_matching=False, update_header_comment=False)
        catalogue.obsolete.clear()
        for message in catalogue:
            message.locations = []  # line numbers change with every edit
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            write_po(file, catalogue, width=100, omit_header=True)
    name = path.relative_to(ROOT)
    there = {message.id for message in catalogue if message.id}
    texts = {message.id for message in wanted if message.id}
    untranslated = sum(1 for message in catalogue if message.id in texts and not message.string)
    fuzzy = sum(1 for message in catalogue if message.id and message.fuzzy)
    counts = {
        "missing": len(texts - there),
        "untranslated": untranslated,
        "fuzzy": fuzzy,
        "left over": len(there - texts),
    }
    for what, count in counts.items():
        if count:
            yield f"{name}: {count} {what}"


def _sphinx(builder: str, out: Path, *flags: str) -> None:
    if builder == "gettext":
        shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-b", builder, "-W", "--keep-going", "-q", *flags, str(DOCS), str(out)]
    env = os.environ if builder != "gettext" else {**os.environ, "DOCS_ONLY": "none"}  # no cell needs to run
    subprocess.run(command, cwd=ROOT, env=env, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
