#!/usr/bin/env bash
# Builds the book: bash dev/docs.sh [PAGE]. HTML in docs/_build/html, and a PDF where LaTeX is installed.
#   PAGE: the cells of this page alone are executed, e.g. book/02-transformer
# Every cell is executed; warnings, broken links inside the book and cells that fail are errors.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=dev/setup.sh
source dev/setup.sh
PY=${PY:-${VENV:-.venv}/bin/python}
"$PY" -c "import myst_nb, sphinx_book_theme, sphinx_copybutton, sphinx_design" 2>/dev/null ||
  die "the book's tools are not installed. Install them: $PY -m pip install -c constraints.txt '.[docs]'"

# both from the same pages: the cells are executed once
build() { "$PY" -m sphinx -b "$1" -d docs/_build/doctrees -W --keep-going -q -j 2 docs "docs/_build/$1"; }

if [ $# -gt 0 ]; then
  page=${1#docs/}
  page=${page%.md}
  [ -f "docs/$page.md" ] || die "there is no page docs/$page.md"
  export DOCS_ONLY=$page
  touch "docs/$page.md"
fi
# the small model that most pages look at, so that no cell of theirs has to wait for it
PYTHONPATH=docs:. NANOCHAT_BASE_DIR=$PWD/docs/_build/lab JAX_PLATFORMS=cpu "$PY" -c "import lab; lab.tiny_run()"
build html
echo "the book: docs/_build/html/index.html"
if [ -n "${DOCS_ONLY:-}" ]; then
  exit
elif command -v latexmk >/dev/null && command -v xelatex >/dev/null; then
  build latex
  log=docs/_build/latex/make.log
  make -s -C docs/_build/latex all-pdf LATEXMKOPTS="-silent -halt-on-error" </dev/null >"$log" 2>&1 ||
    die "LaTeX failed; $PWD/$log says why. It needs the packages texlive-latex-extra and fonts-freefont-otf (Debian's names)"
  echo "as a PDF: docs/_build/latex/nanochat_jax.pdf"
else
  echo "no PDF: latexmk and xelatex were not found"
fi
