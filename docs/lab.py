"""What the book's cells share: figures in one style, and a small model that is trained when it is first asked for.

A cell draws with `show(draw, alt)`; the page shows the light or the dark drawing, whichever suits the reader's theme.
"""

import base64
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from filelock import FileLock  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
BASE_DIR = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path(__file__).parent / "_build" / "lab").absolute()

# The colours of the series, in the order in which they are used; readable on white and on near-black alike.
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3f86e0", "#e2792b", "#2f9e6e", "#a465d6", "#cf4a63", "#8a8f98"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
_INK = {"light": ("#1f2328", "#d8dce2"), "dark": ("#e3e6ea", "#3c434c")}  # text, grid


class Figure:
    """A drawing in two versions. Notebooks and Sphinx choose one of its formats."""

    def __init__(self, light: bytes, dark: bytes, alt: str):
        self._light, self._dark, self._alt = light, dark, alt

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        def image(png: bytes, theme: str) -> str:
            data = base64.b64encode(png).decode()
            alt = self._alt.replace('"', "&quot;")
            # what a notebook shows, which has not the book's style sheet: the light one, on white
            style = "background: white" if theme == "light" else "display: none"
            return f'<img class="only-{theme} figure" style="{style}" alt="{alt}" src="data:image/png;base64,{data}">'

        html = image(self._light, "light") + image(self._dark, "dark")
        return {"text/html": html, "image/png": base64.b64encode(self._light).decode(), "text/plain": self._alt}


def show(draw: Callable[..., None], alt: str, columns: int = 1, width: float = 7.0, height: float = 3.2) -> Figure:
    """Draws twice, for a light and a dark page: draw(ax) or, with more columns, draw(ax, ax, ...).

    Arguments:
        alt: what is to be seen, for those who cannot see it.
        width, height: of the whole, in inches.
    """
    drawn = {}
    for theme, (ink, grid) in _INK.items():
        with plt.rc_context(_style(ink, grid)):
            figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
            draw(*axes[0])
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=160, transparent=True, metadata={"Software": None})
            plt.close(figure)
            drawn[theme] = buffer.getvalue()
    return Figure(drawn["light"], drawn["dark"], alt)


def _style(ink: str, grid: str) -> dict[str, Any]:
    return {
        "axes.prop_cycle": matplotlib.cycler(color=COLORS),
        "font.size": 9.5,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.titlesize": 10,
        "axes.edgecolor": grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "image.cmap": "viridis",
    }


def heat(ax: Any, values: Any, x: list[str] | None = None, y: list[str] | None = None, **kind: Any) -> Any:
    """A matrix as a picture, with labels for its columns and rows. Returns the image, for a colour bar."""
    image = ax.imshow(values, aspect="auto", **kind)
    ax.grid(False)
    if x is not None:
        ax.set_xticks(range(len(x)), x, rotation=60, ha="right")
    if y is not None:
        ax.set_yticks(range(len(y)), y)
    return image


# --- a small model ----------------------------------------------------------------------------------------------------

VOCABULARY = 1024
DEMO_FLAGS = ("--demo", "--depth=2", "--max_seq_len=128", "--total_batch_size=2048")


def command(*arguments: str) -> str:
    """Runs `python -m ARGUMENTS` in the repository, as a reader would in a terminal. Returns what it printed; a command
    that fails raises RuntimeError with all of it."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(BASE_DIR)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=env, text=True, **pipes)
    if done.returncode:
        raise RuntimeError(f"python -m {' '.join(arguments)} ended with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def tiny_run() -> str:
    """The name of a finished base run of depth 2 on the demo world, trained now (in about half a minute) if no page
    before has asked for it. Runs lie in the build folder, where `nanochat_jax.load` finds them."""
    os.environ["NANOCHAT_BASE_DIR"] = str(BASE_DIR)
    BASE_DIR.mkdir(parents=True, exist_ok=True)
    flags = (*DEMO_FLAGS, "--run_name=tiny", "--num_iterations=200", "--eval_tokens=8192")
    done = BASE_DIR / "tiny.done"  # asking the command itself would cost every page the start of JAX
    with FileLock(BASE_DIR / "lab.lock"):
        if done.exists() and done.read_text() == " ".join(flags):
            return "tiny"
        if not (BASE_DIR / "tokenizer").exists():
            command("scripts.tok_train", "--demo", f"--vocab_size={VOCABULARY}")
        command("scripts.train", "--stage=base", *flags)
        done.write_text(" ".join(flags))
    return "tiny"


def tail(text: str, lines: int) -> str:
    """The last lines of a command's output."""
    return "\n".join(text.rstrip().splitlines()[-lines:])
