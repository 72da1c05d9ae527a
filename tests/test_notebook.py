"""The tour as a notebook: the same text and code as its page, in a form that notebook programs take."""

import ast
import json

from dev.notebook import TOUR, notebook

PAGE = """---
kernelspec: {name: python3}
---

# Title

Text.

```{code-cell} python
x = 1

y = 2
```

```bash
ls
```
"""


def test_text_and_code_alternate():
    cells = json.loads(notebook(PAGE))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown"]
    assert ["".join(cell["source"]) for cell in cells] == [
        "# Title\n\nText.",
        "x = 1\n\ny = 2",
        "```bash\nls\n```",
    ]
    assert len({cell["id"] for cell in cells}) == 3


def test_the_notebook_is_the_page():
    made = notebook(TOUR.read_text("utf-8"))
    assert TOUR.with_suffix(".ipynb").read_text("utf-8") == made, "run python -m dev.notebook"
    cells = json.loads(made)["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 8 and all(ast.parse(cell) for cell in code)
    # what only the book understands has no place in a notebook
    assert not any(":::" in line or "{" + "code-cell" in line for cell in cells for line in cell["source"])
