"""Opens every page of the built book in Chromium, wide and on a phone: python -m dev.look [--language=ja] [--npm=DIR].

Ends with status 1 and a list of pages that scroll sideways, code that is hidden behind a scroll bar on a wide screen,
formulas and pictures that are cut off, and math that is not drawn. Needs the extra "dev" and Chromium.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.utils import errors
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.flags import flag, parse

BUILD = Path(__file__).parents[1] / "docs" / "_build"
WIDE, PHONE = 1280, 390
# What is wrong with a page. Something is cut off if it is wider than its box, which does not scroll; on a phone, code
# may scroll inside itself, and so may tables and formulas.
JUDGE = """(wide) => {
  const found = [], seen = element => element.offsetParent !== null
  const over = document.documentElement.scrollWidth - window.innerWidth
  if (over > 0) found.push(`the page is ${over} pixels too wide`)
  const say = (what, element, text) => found.push(`${what}: ${(text || element.textContent).trim().slice(0, 60)}`)
  const article = document.querySelector("article") || document.body
  for (const pre of article.querySelectorAll("pre"))
    if (wide && seen(pre) && pre.scrollWidth > pre.clientWidth + 1) say("code wider than its box", pre)
  for (const box of article.querySelectorAll(".math")) {
    if (!seen(box)) continue
    if (!box.querySelector("mjx-container")) say("math that is not drawn", box)
    else if (wide && box.tagName == "DIV" && box.scrollWidth > box.clientWidth + 1) say("formula behind a bar", box)
  }
  for (const one of article.querySelectorAll("mjx-container, img, table, pre")) {
    const edge = one.getBoundingClientRect().right
    let scrolls = false
    for (let up = one; up && up !== article; up = up.parentElement)
      scrolls ||= ["auto", "scroll"].includes(getComputedStyle(up).overflowX)
    if (seen(one) && edge > window.innerWidth + 1 && !scrolls) say("cut off at the right", one, one.alt)
  }
  return found
}"""


class PagesDoNotFit(UserError, RuntimeError):
    """Something is wrong with a page; the message says what."""


@dataclass(frozen=True)
class LookSettings:
    """Flags."""

    language: str = flag("", "the translation in this language instead of the English book")
    npm: Path | None = flag(None, "node_modules with mathjax and its font, where the network they come from is missing")
    pictures: Path | None = flag(None, "folder for a picture of every page at each width")


def main(argv: list[str]) -> int:
    settings = parse(LookSettings(), argv, f"python -m dev.look: {__doc__}")
    return errors.exit_status(lambda: run(settings))


def run(settings: LookSettings) -> None:
    """Raises PagesDoNotFit."""
    folder = BUILD / (f"html-{settings.language}" if settings.language else "html")
    pages = sorted(page for page in folder.rglob("*.html") if page.parent.name not in ("_static", "_modules"))
    if not pages:
        raise PagesDoNotFit(f"no book in {folder}: bash dev/docs.sh builds it (dev.translations --build: others)")
    problems = 0
    for problem in _look(pages, folder, settings):
        problems += 1
        print(problem, flush=True)
    if problems:
        raise PagesDoNotFit(f"{problems} things do not fit")
    print(f"{len(pages)} pages fit {WIDE} and {PHONE} pixels")


def _look(pages: list[Path], folder: Path, settings: LookSettings) -> Iterator[str]:
    from playwright.sync_api import TimeoutError, sync_playwright

    names = filter(None, [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome"])
    browser_path = next(filter(None, map(shutil.which, names)), None)
    if browser_path is None:
        raise UserError("Chromium is not here: install it, or name it with CHROMIUM=PATH")
    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to sandbox for root
        browser = playwright.chromium.launch(executable_path=browser_path, args=sandbox)
        tab = browser.new_page()
        if settings.npm:
            tab.route(re.compile(r"^https://[^/]+/npm/"), lambda route: _serve(route, settings.npm))
        for page in pages:
            name = page.relative_to(folder).with_suffix("").as_posix()
            tab.goto(page.as_uri())
            if tab.query_selector(".math"):
                with contextlib.suppress(TimeoutError):  # then the page's formulas are named as not drawn
                    tab.wait_for_function("window.MathJax?.startup?.promise", timeout=20_000)
                    tab.evaluate("MathJax.startup.promise")
            for width in (WIDE, PHONE):
                tab.set_viewport_size({"width": width, "height": 900})
                yield from (f"{name}, {width} pixels: {problem}" for problem in tab.evaluate(JUDGE, width == WIDE))
                if settings.pictures:
                    settings.pictures.mkdir(parents=True, exist_ok=True)
                    picture = settings.pictures / f"{name.replace('/', '-')}-{width}.png"
                    tab.screenshot(path=picture, full_page=True)


def _serve(route: Any, npm: Path | None) -> None:
    """A file of a package for an address .../npm/NAME@VERSION/PATH."""
    path = re.sub(r"^https://[^/]+/npm/(@?[^@]+)(@[^/]*)?", r"\1", route.request.url.partition("?")[0])
    file = (npm or Path()) / path
    route.fulfill(path=file) if file.is_file() else route.abort()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
