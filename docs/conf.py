"""Sphinx builds the book by this file: bash dev/docs.sh."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]
# the kernels that execute the cells inherit these
os.environ["PYTHONPATH"] = os.pathsep.join([str(DOCS), str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NANOCHAT_BASE_DIR"] = str(DOCS / "_build" / "lab")

import generated  # noqa: E402
from docutils import nodes  # noqa: E402

project = "nanochat_jax"
author = "the nanochat_jax authors"
copyright = "the nanochat_jax authors, MIT licence"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]
root_doc = "index"
exclude_patterns = ["_build", "README.md", "locale", "tour.ipynb"]

# Text and cells. A page is executed from its start, by itself, and a cell that fails or dawdles fails the build.
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache" if os.environ.get("DOCS_CACHE") else "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # libraries say there what this machine lacks; an error is an output of its own
nb_code_prompt_show = "Show the answer"
nb_code_prompt_hide = "Hide the answer"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as written, not what they hold: a path of this machine, a pattern of 200 characters

html_theme = "sphinx_book_theme"
html_title = "nanochat_jax"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}
html_copy_source = False

# Languages: gettext catalogues in locale/.
locale_dirs = ["locale"]
gettext_compact = False
gettext_uuid = False

# A PDF where LaTeX is installed.
latex_engine = "xelatex"
latex_use_xindy = False  # makeindex comes with every LaTeX, xindy does not
latex_elements = {"papersize": "a4paper", "extraclassoptions": "openany,oneside"}

# DOCS_ONLY=book/01-first-model: the cells of this page alone are executed, the others are shown without results.
if only := os.environ.get("DOCS_ONLY"):
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    nb_execution_excludepatterns = [page for page in pages if page.removesuffix(".md") != only]
    suppress_warnings = ["myst-nb.lexer"]  # what is not executed does not tell its language


def setup(app) -> None:
    app.connect("config-inited", translate_prompts)
    app.connect("builder-inited", write_generated)
    app.connect("doctree-read", name_hidden_code)


def translate_prompts(app, config) -> None:
    """The words over hidden answers, which no catalogue holds."""
    if config.language == "ja":
        config.nb_code_prompt_show, config.nb_code_prompt_hide = "答えを表示する", "答えを隠す"


def name_hidden_code(app, doctree) -> None:
    """A figure's code is hidden as an answer is, but it is none."""
    words = ("コードを表示する", "コードを隠す") if app.config.language == "ja" else ("Show the code", "Hide the code")
    for cell in doctree.findall(nodes.container):
        if cell.get("hide_mode") == "input":
            cell["prompt_show"], cell["prompt_hide"] = words


def write_generated(app) -> None:
    made = DOCS / "_build" / "made"
    # a single page can do without new ones, and the PDF is built after the HTML
    old_will_do = os.environ.get("DOCS_ONLY") or app.builder.format == "latex"
    if not (old_will_do and (made / "commands.md").exists()):
        generated.write(made)
