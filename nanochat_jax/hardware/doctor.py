"""`python -m scripts.doctor`: what this machine has, and what keeps training, serving or evaluating from starting.

Nothing is changed. JAX is started in a process of its own: a plugin that does not fit its driver may end it.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.hardware import gpus as cards
from nanochat_jax.utils import errors, flags, paths
from nanochat_jax.utils.flags import flag

TRAINING, SERVING, EVALUATING = "training", "serving", "evaluating"
ALL = (TRAINING, SERVING, EVALUATING)
# The oldest driver that the CUDA build of each plugin runs on.
DRIVERS = {"cuda12": 525, "cuda13": 580}
PACKAGES = {
    ALL: ("jax", "jaxlib", "flax", "numpy", "tiktoken", "orbax-checkpoint"),
    (TRAINING,): ("optax", "grain", "pyarrow", "huggingface_hub"),
    (SERVING,): ("fastapi", "uvicorn", "prometheus_client"),
}
LITTLE_DISK, NO_DISK = 20e9, 1e9
INSTALL = "pip install . (or: bash speedrun_jax.sh, which makes an environment)"
START = """
import json, jax
found = {"backend": jax.default_backend(), "kinds": [d.device_kind for d in jax.devices()]}
try:
    from jax._src.lib import cuda_versions as v
    found["cudnn"] = [v.cudnn_get_version(), v.cudnn_build_version()] if v else None
except Exception as error:
    found["cudnn"] = None
print(json.dumps(found))
"""


@dataclass(frozen=True)
class DoctorSettings:
    """Flags of scripts.doctor."""

    port: int = flag(8000, "the port that scripts.serve is to listen on")
    json: bool = flag(False, "print JSON instead of text")


@dataclass(frozen=True)
class Finding:
    """What was found of one thing. stops: what would not start; fix: what to do about that or about what is slow."""

    name: str
    what: str
    fix: str = ""
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """A card as nvidia-smi has it; memory in MiB."""

    name: str
    driver: str
    capability: str
    free: int
    total: int


def main(argv: list[str]) -> int:
    """Exit status: 0 training, serving and evaluating would start, 1 one would not, 2 bad flags."""
    settings = flags.parse(DoctorSettings, argv, __doc__ or "", echo=False)

    def action() -> int:
        findings = examine(settings.port)
        if settings.json:
            print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
        else:
            print(describe(findings))
        return int(any(finding.stops for finding in findings))

    return errors.exit_status(action)


def examine(port: int = 8000) -> list[Finding]:
    """Everything, in the order of the page."""
    gpus = query_gpus()
    checks: list[Callable[[], list[Finding]]] = [
        python, packages, rust, lambda: driver(gpus), lambda: start_jax(gpus), lambda: peers(len(gpus)), base_folder,
        lambda: free_port(port), hub,
    ]  # fmt: skip
    return [finding for check in checks for finding in check()]


def describe(findings: Sequence[Finding]) -> str:
    """A page of text: a line for each finding, its fix below it, and what would start."""
    lines = []
    for finding in findings:
        mark = "WRONG" if finding.stops else "note" if finding.fix else "ok"
        lines.append(f"{mark:<6} {finding.name:<10} {finding.what}")
        if finding.fix:
            lines.append(f"{'':<17} -> {finding.fix}")
    for what in ALL:
        against = [finding.name for finding in findings if what in finding.stops]
        lines.append(f"{what} would {'start' if not against else 'NOT start: ' + ', '.join(against)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# software


def python() -> list[Finding]:
    return [Finding("Python", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")]


def packages() -> list[Finding]:
    """The libraries, by their installed metadata; nothing is imported."""
    findings = []
    for stops, names in PACKAGES.items():
        missing = [name for name in names if version_of(name) is None]
        if missing:
            findings.append(Finding("libraries", f"not installed: {', '.join(missing)}", INSTALL, stops))
    if not findings:
        known = ", ".join(f"{name} {version_of(name)}" for name in ("jax", "jaxlib", "flax", "optax"))
        findings.append(Finding("libraries", known))
    return findings


def rust() -> list[Finding]:
    """The module that trains the tokenizer and encodes, and what its kernels for decoding on a CPU may use."""
    if importlib.util.find_spec("rustbpe") is None:
        return [Finding("rustbpe", "not built: no tokenizer can be trained, no text encoded", INSTALL, ALL)]
    import rustbpe

    info = Path("/proc/cpuinfo")
    has = info.read_text().split() if info.exists() else []
    level = "AVX-512" if "avx512f" in has else "AVX2" if "avx2" in has else ""
    if not rustbpe.skinny_rows():
        return [Finding("rustbpe", "built; this processor has no AVX2: decoding on the CPU is left to plain JAX")]
    return [Finding("rustbpe", f"built; kernels for decoding on the CPU use {level}")]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# GPUs


def run(*command: str, timeout: float = 60, **more) -> tuple[int, str, str]:
    """(exit status, output, errors); 127 where there is no such command, 124 where it does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **more)
    except subprocess.TimeoutExpired:
        return 124, "", "it did not answer"
    except OSError as error:
        return 127, "", str(error)
    return done.returncode, done.stdout, done.stderr


def query_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that the driver shows."""
    names = "name,driver_version,compute_cap,memory.free,memory.total"
    status, output, _ = run("nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader,nounits")
    rows = [[part.strip() for part in line.split(",")] for line in output.splitlines()]
    rows = [parts for parts in rows if status == 0 and len(parts) == 5]
    return [Gpu(kind, release, cap, _mib(free), _mib(total)) for kind, release, cap, free, total in rows]


def _mib(text: str) -> int:
    return int(text) if text.isdigit() else 0  # "[N/A]" where memory is the system's


def driver(gpus: Sequence[Gpu]) -> list[Finding]:
    """The driver, the build of JAX that fits it, and each card."""
    if not gpus:
        listed = Path("/proc/driver/nvidia/gpus")
        if listed.is_dir() and any(listed.iterdir()):
            fix = "repair the driver: nvidia-smi must list the GPUs"
            return [Finding("driver", "the system has NVIDIA GPUs, but nvidia-smi does not answer", fix, (TRAINING,))]
        return [Finding("GPUs", "no NVIDIA GPU: everything runs on the CPU")]
    release = int(re.match(r"\d*", gpus[0].driver)[0] or 0)  # pyright: ignore[reportOptionalSubscript]
    build = next((name for name in DRIVERS if version_of(f"jax-{name}-plugin")), None)
    fits = [name for name, oldest in DRIVERS.items() if release >= oldest]
    findings = [Finding("driver", gpus[0].driver)]
    if not fits:
        findings = [Finding("driver", gpus[0].driver, f"update it to {DRIVERS['cuda12']} or newer", ALL)]
    elif build is None:
        fix = f"pip install '.[{fits[0]}]', or pass --device=cpu to every command"
        findings.append(Finding("CUDA", "JAX's CUDA build is not installed", fix, ALL))
    elif build not in fits:
        fix = f"update the driver to {DRIVERS[build]} or newer, or pip install '.[{fits[-1]}]'"
        findings.append(Finding("CUDA", f"jax-{build}-plugin is too new for the driver", fix, ALL))
    else:
        suffix = build.removeprefix("cuda")
        libraries = (f"nvidia-{name}-cu{suffix}" for name in ("cudnn", "nccl"))
        known = [f"{name} {version}" for name in libraries if (version := version_of(name))]
        findings.append(Finding("CUDA", ", ".join([f"jax-{build}-plugin {version_of(f'jax-{build}-plugin')}", *known])))
    return findings + [_card(index, gpu) for index, gpu in enumerate(gpus)]


def _card(index: int, gpu: Gpu) -> Finding:
    what = f"{gpu.name}, capability {gpu.capability}, {gpu.free / 1024:.1f} of {gpu.total / 1024:.1f} GiB free"
    name = f"GPU {index}"
    if gpu.capability.replace(".", "").isdigit() and float(gpu.capability) < 8:
        return Finding(name, what, "it has no bfloat16 units: it trains in float32, several times slower")
    if gpu.free < gpu.total / 2:
        return Finding(name, what, "another process has the rest (nvidia-smi names it): end it, or train less deep")
    if cards.of_device(gpu.name) is None:
        return Finding(
            name, what, "not in the table of hardware/gpus.py: its speed is measured, plans name another card"
        )
    return Finding(name, what)


def start_jax(gpus: Sequence[Gpu]) -> list[Finding]:
    """Starts JAX as a command would, and reads what it runs on."""
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    status, output, said = run(sys.executable, "-c", START, timeout=180, env=env)
    last = (said.strip() or "nothing").splitlines()[-1]
    try:
        found = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        fix = f"{_library_hint()}or pass --device=cpu" if gpus else INSTALL
        return [Finding("JAX", f"does not start (exit status {status}): {last[-300:]}", fix, ALL)]
    kinds = sorted(set(found["kinds"]))
    what = f"{len(found['kinds'])} x {', '.join(kinds)} ({found['backend']})"
    if gpus and found["backend"] == "cpu":
        fix = f"{_library_hint()}install the CUDA build (pip install '.[cuda12]'), or pass --device=cpu"
        return [Finding("JAX", f"{what}, though there are GPUs", fix, ALL)]
    findings = [Finding("JAX", what)]
    if found["cudnn"]:
        loaded, built = found["cudnn"]
        fix, stops = "", ()
        if loaded < built:
            fix, stops = f"{_library_hint()}pip install -U nvidia-cudnn-cu12 (or -cu13)", (TRAINING, EVALUATING)
        findings.append(Finding("cuDNN", f"{loaded} loaded, JAX was built for {built}", fix, stops))
    return findings


def _library_hint() -> str:
    clash = os.environ.get("LD_LIBRARY_PATH")
    return f"unset LD_LIBRARY_PATH ({clash}), which hides JAX's own CUDA libraries; " if clash else ""


def peers(gpus: int) -> list[Finding]:
    """Whether GPUs reach each other's memory."""
    if gpus < 2:
        return []
    status, output, _ = run("nvidia-smi", "topo", "-p2p", "r")
    rows = re.findall(r"^\s*GPU\d+\s+(.*)$", re.sub(r"\x1b\[[\d;]*m", "", output), re.M)
    states = {word for row in rows for word in row.split()} - {"X"}
    states = {word for word in states if not word.startswith("GPU")}
    if status or not states:
        return [Finding("P2P", "nvidia-smi does not say")]
    if states == {"OK"}:
        return [Finding("P2P", "every GPU reaches every other")]
    fix = (
        "gradients go through the host's memory, slower; on servers allow it in the BIOS (ACS off), in VMs it may stay"
    )
    return [Finding("P2P", f"not between all GPUs ({', '.join(sorted(states))})", fix)]


# ---------------------------------------------------------------------------------------------------------------------
# disk, ports, hub


def base_folder() -> list[Finding]:
    """The folder for everything that is made: that it can be written to, and what fits."""
    variable = paths.BASE_DIR_VARIABLE
    try:
        folder = paths.base_dir()
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"1")
            file.flush()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        fix = f"set {variable} to a folder that can be written to"
        return [Finding("disk", errors.in_words(error), fix, (TRAINING, EVALUATING))]
    what = f"{folder} ({variable}), {free / 1e9:.0f} GB free"
    if free < NO_DISK:
        return [Finding("disk", what, f"free some space, or set {variable} elsewhere", (TRAINING, EVALUATING))]
    enough = "enough for the demo; see the disk that `python -m scripts.plan` asks for"
    return [Finding("disk", what, enough if free < LITTLE_DISK else "")]


def free_port(port: int) -> list[Finding]:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError as error:
            fix = f"end what listens there, or pass another --port to scripts.serve (0: any); {error.strerror}"
            return [Finding("port", f"{port} cannot be had", fix, (SERVING,))]
    return [Finding("port", f"{port} is free")]


def hub() -> list[Finding]:
    """Where data sets come from. The demo needs none, so nothing stops without it."""
    if paths.offline() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return [Finding("hub", f"offline, as {paths.OFFLINE_VARIABLE} or HF_HUB_OFFLINE asks")]
    if importlib.util.find_spec("huggingface_hub") is None:
        return []
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except (OSError, ValueError) as error:
        fix = "the demo needs none; else check network and proxy, or set HF_ENDPOINT to a mirror"
        return [Finding("hub", f"{constants.ENDPOINT} cannot be reached: {getattr(error, 'reason', error)}", fix)]
    return [Finding("hub", f"{constants.ENDPOINT} can be reached")]
