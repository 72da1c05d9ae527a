"""Programs compiled for a card that is not there (XLA needs its limits only), and their numbers: cached, by code, flags
and versions, or from a process that compiles them (child.py)."""

import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nanochat_jax
from nanochat_jax.hardware import xla_flags
from nanochat_jax.hardware.gpus import CARDS, Card
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.paths import base_dir, sha256_hex, write_atomic

PACKAGE = Path(nanochat_jax.__file__).parent
CUDA_VERSION = "12.9.0"  # of driver and toolkit, on the node that is planned for


INSTALL = "pip install '.[plan]'; no GPU is needed"


class NoPlugin(UserError, RuntimeError):
    """The CUDA plugin of JAX is not installed, so nothing can be compiled for a GPU."""


class CompileError(UserError, RuntimeError):
    """The compiling process failed; the message holds the end of what it said."""


@dataclass(frozen=True)
class Case:
    """One program to compile. program: "step" (training), "evaluation" or "sampling". rows are those of one device;
    of sampling, slots. T: tokens per row, of sampling the capacity of a slot."""

    program: str
    gpu: str
    gpus: int
    depth: int
    vocab_size: int
    T: int
    rows: int
    accumulation: int = 1
    remat: str = "none"
    fsdp: int = 1
    tensor: int = 1
    recipe: str = "v1"
    fp8: bool = False


def results(cases: Sequence[Case], say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """The numbers of `child.compile_case` for every case, in order. Cases of one call share card and number of GPUs.

    What is not cached is compiled in one child process, and cached as soon as it is done. Raises NoPlugin
    without the CUDA plugin (cached numbers are found without it), CompileError when the compiler fails.
    """
    # 1. the environment in which XLA believes it has these cards, and what was compiled in it before
    env = environment(CARDS[cases[0].gpu], cases[0].gpus) if cases else {}
    paths = [_cache_path(case, env.get("XLA_FLAGS", "")) for case in cases]
    found = [_read(path) for path in paths]
    missing = [i for i, facts in enumerate(found) if facts is None]
    if missing:
        if plugin_version() is None:
            raise NoPlugin(f"the CUDA plugin of JAX is not installed ({INSTALL})")
        # 2. the rest in one child process, since a process sees one kind of card only
        done = _compile([cases[i] for i in missing], env, say)
        # 3. each case is cached as soon as its line has come
        for i, facts in zip(missing, done, strict=True):
            found[i] = facts
            with contextlib.suppress(OSError):  # a full disk costs the next call a compilation, no more
                write_atomic(paths[i], json.dumps(facts))
    return [facts for facts in found if facts is not None]


def _compile(cases: Sequence[Case], env: dict[str, str], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The numbers of every case, each as soon as the child process prints its line."""
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
            for case in cases:
                say(f"compiling {_name(case)} ...")
                line = child.stdout.readline()
                if not line:
                    child.wait()
                    errors.seek(0)
                    end = errors.read()[-1500:].strip()
                    raise CompileError(f"compiling {_name(case)} failed (exit status {child.returncode}): {end}")
                yield json.loads(line)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def _name(case: Case) -> str:
    what = {"step": "a training step", "evaluation": "the evaluation", "sampling": "sampling"}[case.program]
    return f"{what} of depth {case.depth}, {case.rows} rows a GPU, for {case.gpus} x {CARDS[case.gpu].name}"


def _cache_path(case: Case, flags: str) -> Path:
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


# ---------------------------------------------------------------------------------------------------------------------
# a card that is not there, as a compile target


def text_proto(card: Card) -> str:
    """XLA's `GpuTargetConfigProto` of a card, as text."""
    major, minor = card.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": card.shared_per_core,
        "shared_memory_per_block_optin": card.shared_optin,
        "threads_per_core_limit": card.threads_per_core,
        "core_count": card.cores,
        "fpus_per_core": card.fpus_per_core,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "memory_bandwidth": int(card.memory_bandwidth),
        "l2_cache_size": card.l2_bytes,
        "clock_rate_ghz": card.clock_ghz,
        "device_memory_size": card.memory_bytes,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    # as a real process would report them: what XLA puts into CUDA graphs depends on them
    versions = ("driver_version", "runtime_version", "compile_time_toolkit_version")
    lines += [f'  {name}: "{CUDA_VERSION}"' for name in versions]
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}")
    if card.links:
        lines.append(f"  device_interconnect_info {{ active_links: {card.links} }}")
    dnn = "dnn_version_info {{ major: {} minor: {} patch: {} }}".format(*_cudnn_version())
    info = "\n".join(lines)
    return f'gpu_device_info {{\n{info}\n}}\nplatform_name: "CUDA"\n{dnn}\ndevice_description_str: "{card.name}"\n'


def _cudnn_version() -> tuple[int, int, int]:
    """Of the cuDNN that the plugin brings: the one the real run uses."""
    for package in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        try:
            found = re.match(r"(\d+)\.(\d+)\.(\d+)", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
        if found:
            return int(found[1]), int(found[2]), int(found[3])
    return 9, 10, 0


def _do_without_cudnn() -> None:
    """JAX asks cuDNN for its version before it lowers attention. To compile, cuDNN itself (1 GB) is not needed."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    try:
        fused.check_cudnn_version()
    except RuntimeError:
        major, minor, patch = _cudnn_version()
        fused.check_cudnn_version = lambda: 10_000 * major + 100 * minor + patch


def _tell_pallas_of(card: Card) -> None:
    """From 0.11 on Pallas asks JAX for the GPU that it writes a kernel for (before, it took any for an H100)."""
    try:
        from jax._src.pallas.triton import gpu_info  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return
    major, minor = card.capability
    info = gpu_info.GpuInfo(gpu_version=None, arch_name=f"{major}.{minor}", compute_capability=10 * major + minor)
    gpu_info.get_gpu_info = lambda: info


def plugin_version() -> str | None:
    """The version of the installed CUDA plugin; None if there is none."""
    for package in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def environment(card: Card, gpus: int, decodes: bool = False) -> dict[str, str]:
    """The environment of a process that compiles for the card: the flags of a real run, but no GPU is touched."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    env.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # our own cache holds the few numbers that matter
    xla_flags.apply(card.name, gpus, decodes=decodes, environ=env)
    return env


def devices(card: Card, gpus: int) -> list:
    """Devices to build a mesh of. Raises NoPlugin without the CUDA plugin. Call in a process of `environment`."""
    from jax.experimental import topologies

    if plugin_version() is None:
        raise NoPlugin(f"compiling for a GPU needs the CUDA plugin of JAX ({INSTALL})")
    _do_without_cudnn()
    _tell_pallas_of(card)
    described = topologies.get_topology_desc(
        card.name, platform="cuda", target_config=text_proto(card), topology=f"1x1x{gpus}"
    )
    return list(described.devices)
