"""Numbers of compiled programs: cached, by code, flags and versions, or from a process that compiles them."""

import contextlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nanochat_jax
from nanochat_jax.hardware.gpus import CARDS
from nanochat_jax.planner import target
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.paths import base_dir, sha256_hex, write_atomic

if TYPE_CHECKING:
    from nanochat_jax.planner.child import Case

PACKAGE = Path(nanochat_jax.__file__).parent


class CompileError(UserError, RuntimeError):
    """The compiling process failed; the message holds the end of what it said."""


def results(cases: "Sequence[Case]", say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """The numbers of `child.compile_case` for every case, in order. Cases of one call share card and number of GPUs.

    What is not cached is compiled in one child process, and cached as soon as it is done. Raises target.NoPlugin
    without the CUDA plugin (cached numbers are found without it), CompileError when the compiler fails.
    """
    env = target.environment(CARDS[cases[0].gpu], cases[0].gpus) if cases else {}
    paths = [_cache_path(case, env.get("XLA_FLAGS", "")) for case in cases]
    found = [_read(path) for path in paths]
    missing = [i for i, facts in enumerate(found) if facts is None]
    if missing:
        if target.plugin_version() is None:
            raise target.NoPlugin("the CUDA plugin of JAX is not installed (pip install '.[cuda12]'; no GPU is needed)")
        done = _compile([cases[i] for i in missing], env, say)
        for i, facts in zip(missing, done, strict=True):
            found[i] = facts
            with contextlib.suppress(OSError):  # a full disk costs the next call a compilation, no more
                write_atomic(paths[i], json.dumps(facts))
    return [facts for facts in found if facts is not None]


def _compile(cases: "Sequence[Case]", env: dict[str, str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "nanochat_jax.planner.child"]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**env, "PYTHONPATH": str(PACKAGE.parent)},
        )  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps([asdict(case) for case in cases]))
            child.stdin.close()
            answers = []
            for case in cases:
                say(f"compiling {_name(case)} ...")
                line = child.stdout.readline()
                if not line:
                    child.wait()
                    errors.seek(0)
                    end = errors.read()[-1500:].strip()
                    raise CompileError(f"compiling {_name(case)} failed (exit status {child.returncode}): {end}")
                answers.append(json.loads(line))
            return answers
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def _name(case: "Case") -> str:
    what = {"step": "a training step", "evaluation": "the evaluation", "sampling": "sampling"}[case.program]
    return f"{what} of depth {case.depth}, {case.rows} rows a GPU, for {case.gpus} x {CARDS[case.gpu].name}"


def _cache_path(case: "Case", flags: str) -> Path:
    card = repr(CARDS[case.gpu])
    key = sha256_hex(json.dumps([asdict(case), card, flags, code_hash(), _versions()]).encode())
    return base_dir() / "compile_cache" / "plan" / f"{key[:32]}.json"


def code_hash() -> str:
    """Of all sources that a compiled program, or its counting, may depend on."""
    folders = ("hardware", "inference", "model", "parallel", "planner", "training")
    files = [f for folder in folders for f in (PACKAGE / folder).rglob("*.py")]
    return sha256_hex(*[part for f in sorted(files) for part in (f.name.encode(), f.read_bytes())])


def _versions() -> list[str]:
    names = ("jax", "jaxlib", "flax", "optax")
    # without the plugin, what was compiled with the newest one on this jaxlib still holds
    return [f"{name} {importlib.metadata.version(name)}" for name in names]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None
