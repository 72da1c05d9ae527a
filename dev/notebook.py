"""Makes the notebook of the tour from its page: python -m dev.notebook writes docs/tour.ipynb from docs/tour.md.

The page is MyST Markdown: cells of code stand between fences, text is everything else. The notebook has no outputs;
whoever opens it runs it. tests/test_notebook.py fails while the two differ.
"""

import json
import re
from pathlib import Path
from typing import Any

TOUR = Path(__file__).parents[1] / "docs" / "tour.md"
_HEAD = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_CODE = re.compile(r"^```\{code-cell\} python\n(.*?)^```$\n?", re.DOTALL | re.MULTILINE)


def notebook(page: str) -> str:
    """The JSON of the notebook (format 4.5) with the page's text and code in its order."""
    parts = _CODE.split(_HEAD.sub("", page))  # text, code, text, ...
    kinds = ["markdown", "code"] * len(parts)
    cells = [_cell(kind, part.strip()) for kind, part in zip(kinds, parts, strict=False) if part.strip()]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, text: str) -> dict[str, Any]:
    cell = {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []}


if __name__ == "__main__":
    TOUR.with_suffix(".ipynb").write_text(notebook(TOUR.read_text("utf-8")), "utf-8")
