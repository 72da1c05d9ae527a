"""An environment for speedrun_jax.sh that needs no installation: the tests' own Python, said to be complete."""

import re
import shlex
import sys
from pathlib import Path

from tests import children

ROOT = Path(__file__).resolve().parent.parent


# Plans are made by formula: to compile depth 32 for a card takes minutes, where what compiles for it is installed.
PYTHON = f"""#!/bin/sh
case " $* " in *" scripts.plan "*) set -- "$@" --compile=False ;; esac
exec {shlex.quote(sys.executable)} "$@"
"""


def make(venv: Path, python: str = PYTHON) -> Path:
    """The folder VENV, whose Python is the given script."""
    file = venv / "bin" / "python"
    file.parent.mkdir(parents=True)
    file.write_text(python)
    file.chmod(0o755)
    setup = (ROOT / "dev" / "setup.sh").read_text()  # as it reckons what an environment was made of
    sources = re.findall(r"sources=\$\((.*)\)$", setup, re.M)[0]
    made_of = children.run(["bash", "-c", sources], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (venv / ".nanochat_setup").write_text(f"{made_of.strip()} . cuda12\n")
    return venv
