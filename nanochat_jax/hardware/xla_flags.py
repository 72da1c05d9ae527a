"""XLA and NCCL settings for GPUs: one table, each row with its reason, each XLA flag proved to parse before it is used.

A flag that jaxlib does not know ends the process inside C++, with no exception, so nothing may be set on trust: flags
come and go between releases, and lists copied from elsewhere contain some that are gone. A child process parses them
(0.3 s, once per jaxlib version), and what it refuses is left out with a note. What the user has set always wins.
"""

import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.paths import base_dir, write_atomic

logger = logging.getLogger(__name__)

# Of a GPU's memory, the part JAX takes for its pool at the start. The rest is for what lives outside the pool: the CUDA
# context, NCCL's buffers, kernels.
MEMORY_FRACTION = 0.92

_GENERATIONS = {
    "hopper": ("H100", "H200", "H800", "GH200", "H20"),
    "blackwell": ("B100", "B200", "B300", "RTX 50", "RTX PRO"),
    "ampere": ("A100", "A800", "A40", "A30", "A10", "A6000", "A5000", "RTX 30"),
    "ada": ("L40S", "L40", "L4", "RTX 40", "6000 Ada"),
}


@dataclass(frozen=True)
class Node:
    """The GPUs of one machine: the maker's name of the first, how many, and whether this process has them to itself."""

    kind: str
    gpus: int
    alone: bool = True

    @property
    def generation(self) -> str:
        """ "ampere", "ada", "hopper", "blackwell", or "" for a card not known here."""
        found = [(len(part), name) for name, parts in _GENERATIONS.items() for part in parts if part in self.kind]
        return max(found)[1] if found else ""  # the longest match: "A6000" is no "A60"


@dataclass(frozen=True)
class Setting:
    """An XLA flag (a name that starts with xla_) or an environment variable, and when it is right."""

    name: str
    value: str
    reason: str
    when: Callable[[Node], bool] = lambda node: True

    @property
    def is_flag(self) -> bool:
        return self.name.startswith("xla_")

    @property
    def flag(self) -> str:
        return f"--{self.name}={self.value}"


SETTINGS = (
    Setting(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "starts collectives as early and ends them as late as the data allows, so that they run beside computation",
        lambda node: node.gpus > 1,
    ),
    Setting(
        "XLA_CLIENT_MEM_FRACTION",
        str(MEMORY_FRACTION),
        "JAX takes three quarters of the memory by default; a training process has the card to itself",
        lambda node: node.alone,
    ),
    Setting(
        "XLA_PYTHON_CLIENT_PREALLOCATE",
        "false",
        "memory is taken as it is needed, so that a chat or a server finds room beside a run that trains",
        lambda node: not node.alone,
    ),
    Setting(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "one hardware queue keeps the order in which work was issued, so that a collective starts before the matrix "
        "product that is to hide it (Hopper and before; not advised on Blackwell)",
        lambda node: node.gpus > 1 and node.generation in ("ampere", "hopper"),
    ),
    Setting(
        "NCCL_DEBUG",
        "WARN",
        "without it a failed collective only says 'unhandled error'; with it NCCL names the link or the peer",
        lambda node: node.gpus > 1,
    ),
)

# The two names of the pool's share, and other ways to size the pool: whoever sets one of these has decided.
_MEMORY_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


class FlagError(UserError, ValueError):
    """XLA_FLAGS, as the user set it, would end the process; the message names the flag."""


def settings_for(node: Node) -> list[Setting]:
    """The rows of the table that suit the node; none for a machine without GPUs."""
    return [s for s in SETTINGS if node.gpus > 0 and s.when(node)]


def merge(settings: Sequence[Setting], environ: Mapping[str, str]) -> tuple[dict[str, str], list[Setting]]:
    """({variable: value} still to be set, the settings that it contains): what the user decided is left out."""
    own = environ.get("XLA_FLAGS", "")
    in_file = bool(own.strip()) and not own.strip().startswith("--")  # XLA_FLAGS may name a file of flags: all theirs
    names = {part.removeprefix("--").partition("=")[0] for part in own.split()}
    taken = [s for s in settings if s.is_flag and s.name not in names and not in_file]
    for s in settings:
        decided = _MEMORY_VARIABLES if s.name in _MEMORY_VARIABLES else (s.name,)
        if not s.is_flag and not any(v in environ for v in decided):
            taken.append(s)
    changes = {s.name: s.value for s in taken if not s.is_flag}
    flags = [s.flag for s in taken if s.is_flag]
    if flags:
        changes["XLA_FLAGS"] = " ".join([*flags, own]).strip()  # the last of two equal flags counts: the user's
    return changes, taken


def apply(node: Node, environ: MutableMapping[str, str] | None = None) -> list[str]:
    """Sets the node's settings in the environment (os.environ); returns lines that say what was set and left out.

    Must run before JAX's backend starts. Raises FlagError when the user's own XLA_FLAGS would end the process.
    """
    environ = os.environ if environ is None else environ
    settings = settings_for(node)
    if not settings:
        return []
    own = environ.get("XLA_FLAGS", "").split()
    if bad := unknown_flags([flag for flag in own if flag.startswith("--")]):
        raise FlagError(
            f"XLA_FLAGS contains {', '.join(bad)}, which jaxlib {_versions()} does not know: the process would end "
            f"without an error. Remove it from XLA_FLAGS (now: {' '.join(own)})"
        )
    unknown = unknown_flags([s.flag for s in settings if s.is_flag])
    changes, taken = merge([s for s in settings if s.flag not in unknown], environ)
    environ.update(changes)
    notes = [f"{s.flag if s.is_flag else f'{s.name}={s.value}'} ({s.reason})" for s in taken]
    return notes + [f"left out, unknown to jaxlib {_versions()}: {flag}" for flag in unknown]


# ---------------------------------------------------------------------------------------------------------------------
# which flags parse


# Only jaxlib: its parser is that of the GPU plugin of the same version, and it needs no GPU to be asked.
_PARSE = "from jaxlib import xla_client as x; x.CompileOptions().executable_build_options.debug_options"


def unknown_flags(flags: Sequence[str], cache: Path | None = None) -> list[str]:
    """Those of the flags ("--name=value") that the installed jaxlib does not take.

    Asked of a child process, since the answer may be its end; remembered in a file of the base directory.
    """
    if not flags:
        return []
    cache = base_dir() / "compile_cache" / "xla_flags.json" if cache is None else cache
    known, version = _remembered(cache), _versions()
    answers: dict[str, bool] = known.get(version, {})
    if todo := [flag for flag in flags if flag not in answers]:
        refused = _refused(todo)
        answers |= {flag: flag not in refused for flag in todo}
        try:
            write_atomic(cache, json.dumps({version: answers}, indent=1))  # of other versions nothing need be kept
        except OSError as error:
            logger.info("which XLA flags parse could not be remembered (%s): they are parsed at every start", error)
    return [flag for flag in flags if not answers[flag]]


def _refused(flags: Sequence[str]) -> list[str]:
    """All together first, as nearly always all are known; one by one only when the child died."""
    if _parses(flags):
        return []
    return [flag for flag in flags if not _parses([flag])]


def _parses(flags: Sequence[str]) -> bool:
    env = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    child = subprocess.run([sys.executable, "-c", _PARSE], env=env, capture_output=True, text=True, timeout=120)
    if child.returncode and not re.search("XLA_FLAGS|flag", child.stderr):
        raise RuntimeError(
            f"jaxlib {_versions()} could not be asked which XLA flags it knows: {child.stderr.strip()[-500:]}"
        )
    return child.returncode == 0


def _remembered(cache: Path) -> dict[str, dict[str, bool]]:
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _versions() -> str:
    """Of jaxlib and, where there is one, of its GPU plugin, whose parser must agree."""
    versions = [importlib.metadata.version("jaxlib")]
    for plugin in ("jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        try:
            version = importlib.metadata.version(plugin)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version not in versions:
            versions.append(version)
    return " / ".join(versions)
