# Sourced by speedrun_jax.sh, dev/test.sh and .ci/run: makes the virtual environment and installs the project into it.
#
#   setup_environment EXTRAS     e.g. setup_environment "" | "cuda12" | "dev,plan"
#
# Sets $PY to the environment's Python. Does nothing when the environment already matches the sources.
# VENV (default .venv) chooses the folder, PYTHON the interpreter to make it with.

die() { echo "error: $*" >&2; exit 1; }

# find_python EXTRAS: on GPUs the newest, since newer compilers are better there, and they need Python 3.12. One that
# cannot make an environment (Debian's, without python3-venv) only where there is no other.
find_python() {
  local candidate needed candidates="python3 python3.13 python3.12 python3.11 python"
  case $1 in *cuda*) candidates="python3.13 python3.12 python3 python3.11 python" ;; esac
  for needed in ensurepip sys; do
    for candidate in ${PYTHON:-} $candidates; do
      if command -v "$candidate" >/dev/null 2>&1 &&
         "$candidate" -c "import sys, $needed; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then
        echo "$candidate"; return
      fi
    done
  done
  die "Python 3.11 or newer is needed and was not found. Install it, or name it: PYTHON=/path/to/python3 bash $0"
}

setup_environment() {
  local extras=$1 venv=${VENV:-.venv} base sources stamp
  base=$(find_python "$extras")
  PY=$venv/bin/python
  stamp=$venv/.nanochat_setup # a line "SOURCES EXTRAS" for everything installed from the current sources
  sources=$(cat pyproject.toml constraints*.txt rustbpe/Cargo.* $(find rustbpe/src -name "*.rs" | sort) | cksum | tr ' ' -)
  grep -q "^$sources.* ${extras:-.}" "$stamp" 2>/dev/null && return
  [ -x "$PY" ] || "$base" -m venv "$venv" ||
    die "could not make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"
  echo "Installing into $venv with $("$PY" -V): a few minutes, once ..."
  local constraints=constraints-3.12.txt # jax after 0.10 needs Python 3.12
  if "$PY" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then constraints=constraints.txt; fi
  "$PY" -m pip install --quiet --disable-pip-version-check -c "$constraints" ".${extras:+[$extras]}" ||
    die "installing failed; the lines above say why. With no network to fetch Rust, install it first: https://rustup.rs"
  grep -q "^$sources" "$stamp" 2>/dev/null || : >"$stamp"
  echo "$sources . $extras" >>"$stamp"
}

find_chromium() {
  local candidate
  for candidate in "${CHROMIUM:-}" chromium chromium-browser google-chrome chrome; do
    # Ubuntu's package is a stub without snap: it has to start
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 && "$candidate" --version >/dev/null 2>&1; then
      echo "$candidate"; return
    fi
  done
  return 1
}

# Chromium, which the tests of the chat page need: from the distribution, as root. False where it cannot be had.
setup_chromium() {
  find_chromium >/dev/null && return
  { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; } || return 1
  echo "Installing Chromium for the tests of the chat page ..."
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null || return 1
  find_chromium >/dev/null
}
