"""Makes the pictures of the README and the docs from a real run: python -m dev.make_images [--run=NAME]; see --help.

chat.png shows the chat page in front of `python -m scripts.serve`, with a conversation that the model has just had;
learning_curve.png the held-out bits per byte and the training loss of the run and of those that it was trained from.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.report import collect
from nanochat_jax.report.plots import COLORS, smoothed, thinned
from nanochat_jax.runs.checkpoint import find_run
from nanochat_jax.utils import errors
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.flags import flag, parse

WINDOW = {"width": 1120, "height": 720}
MAX_HEIGHT = 1600
PATIENCE_MS = 120_000


class NoBrowser(UserError, RuntimeError):
    """The chat page cannot be shown: Chromium is missing, or the server did not start."""


@dataclass(frozen=True)
class ImageSettings:
    """Flags."""

    run: str | None = flag(None, "the run to show; default: the newest")
    out: str = flag("docs/images", "folder for chat.png and learning_curve.png")
    questions: str = flag(
        'Hello!|Who are you?|What is 348 + 275?|How many "r" are in "strawberry"?|Where does Mia live?',
        "what is asked, separated by |",
    )
    temperature: float = flag(0.0, "of the answers; 0 = always the most likely token")
    chromium: str | None = flag(None, "the browser; default: the environment's CHROMIUM, or the one on the PATH")


# --- the learning curve -----------------------------------------------------------------------------------------------


def lineage(name: str) -> list[collect.Run]:
    """The run and those it was trained from, the first one first, without reinforcement learning (its loss is another
    quantity). Raises ReportError where one of them is missing."""
    runs = [collect.load_run(name)]
    while parent := runs[0].meta.get("parent"):
        runs.insert(0, collect.load_run(parent["run"]))
    return [run for run in runs if run.stage != "rl"]


def draw_curves(runs: Sequence[collect.Run], path: Path) -> None:
    """Two panels side by side as PNG: held-out bits per byte, and training loss, stage after stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), dpi=160, layout="constrained")
    bpb, loss = figure.subplots(1, 2)
    for axes, title in (
        (bpb, "held-out bits per byte (each stage on its own text)"),
        (loss, "training loss (nats per token)"),
    ):
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("optimizer steps, stage after stage")
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    before = 0
    for run, color in zip(runs, COLORS, strict=False):
        steps, values = collect.curve(run.evals, "val_bpb")
        label = f"{run.stage}: {values[-1]:.3f}" if values else run.stage
        bpb.plot([before + s for s in steps], values, color=color, marker="o", markersize=3, label=label)
        steps, values = collect.curve(run.train, "loss")
        steps = [before + s for s in steps]
        loss.plot(*thinned(steps, values), color=color, alpha=0.25, linewidth=0.7)
        loss.plot(*thinned(steps, smoothed(values)), color=color, linewidth=1.6, label=run.stage)
        before += run.step
    for axes in (bpb, loss):
        axes.legend(frameon=False)
    figure.savefig(path)


# --- the chat page ----------------------------------------------------------------------------------------------------


@contextmanager
def server(run: str, temperature: float) -> Iterator[str]:
    """The address of a server of `run`, which is ended afterwards."""
    command = [sys.executable, "-m", "scripts.serve", f"--run={run}", "--port=0", f"--temperature={temperature}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if ready := re.search(r"ready at (http://\S+)", line):
                threading.Thread(target=process.stdout.read, daemon=True).start()  # its pipe must not fill up
                yield ready.group(1)
                return
        raise NoBrowser(f"the server ended with status {process.wait()} before it was ready; its lines above say why")
    finally:
        process.terminate()
        process.wait(30)


def find_chromium(named: str | None) -> str:
    """The path of the browser. Raises NoBrowser, saying how to name it, where there is none."""
    named = named or os.environ.get("CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise NoBrowser(f"there is no {' or '.join(names)}: install Chromium, or name it with --chromium=PATH")
    return found


def photograph_chat(address: str, questions: Sequence[str], chromium: str, path: Path) -> list[str]:
    """Asks the questions one after the other, writes the page as PNG, and returns the answers."""
    from playwright.sync_api import Page, expect, sync_playwright

    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to sandbox for root
    window: Any = WINDOW
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        expect.set_options(timeout=PATIENCE_MS)

        def conversation(asked: Sequence[str]) -> Page:
            page = browser.new_page(viewport=window, device_scale_factor=2, color_scheme="light")
            page.goto(address)
            expect(page.locator("#model")).to_have_attribute("data-state", "ready")
            for number, question in enumerate(asked, 1):
                page.locator("#input").fill(question)
                page.locator("#input").press("Enter")
                expect(page.locator(".assistant")).to_have_count(number)
                expect(page.locator("#log")).to_have_attribute("aria-busy", "false")
            return page

        conversation(questions[:1]).close()  # the first answer of a server is slower than those that follow
        page = conversation(questions)
        hidden = page.evaluate("(e => e.scrollHeight - e.clientHeight)(document.getElementById('scroll'))")
        page.set_viewport_size(window | {"height": min(WINDOW["height"] + hidden, MAX_HEIGHT)})
        page.locator("#input").blur()
        page.screenshot(path=path)
        said = page.locator(".assistant .body").all_inner_texts()
        browser.close()
    return said


def main(argv: Sequence[str]) -> int:
    s = parse(ImageSettings, argv, (__doc__ or "").split("\n\n")[0])
    return errors.exit_status(lambda: _make(s))


def _make(s: ImageSettings) -> None:
    out = Path(s.out)
    chromium = find_chromium(s.chromium)
    run = s.run or find_run().name
    runs = lineage(run)
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(runs, out / "learning_curve.png")
    print(f"{out / 'learning_curve.png'}: {', '.join(r.name for r in runs)}")
    questions = s.questions.split("|")
    with server(run, s.temperature) as address:
        answers = photograph_chat(address, questions, chromium, out / "chat.png")
    for question, answer in zip(questions, answers, strict=True):
        print(f"  {question}\n    {' '.join(answer.split())}")
    print(out / "chat.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
