"""How a step is executed: which attention, norms, matmuls, collectives; and whether that is the fast way."""

import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanochat_jax.hardware import xla_flags
from nanochat_jax.hardware.devices import DeviceError
from nanochat_jax.model import float8, fused
from nanochat_jax.model.attention import choose_implementation
from nanochat_jax.model.config import GPTConfig

_ATTENTION = {"cudnn": "cuDNN's attention", "xla": "XLA's attention", "blocked": "blocked attention"}


@dataclass(frozen=True)
class Execution:
    """line: all of it, in one line. slow: what is not the fast way of this device, each with its reason and remedy."""

    line: str
    slow: tuple[str, ...]


def execution(config: GPTConfig, mesh: Mesh, fp8: bool = False, fused_norms: bool = True) -> Execution:
    """Of a training step of this model on this mesh. Nothing is called slow on a CPU: there it has one way. Raises
    DeviceError for float8 on a GPU that has none."""
    device = mesh.devices.flat[0]
    gpu = device.platform in ("gpu", "cuda")
    slow = []
    # 1. attention
    dtype = jnp.dtype(config.dtype).name
    chosen, why = choose_implementation(config.attention, jax.default_backend(), dtype, config.head_dim)
    if gpu and chosen != "cudnn":
        slow.append(f"{_ATTENTION[chosen]} is slower than cuDNN's, and needs memory for all scores ({why})")
    # 2. norms
    unfused = norms_refused(config, device, fused_norms)
    if gpu and unfused:
        slow.append(f"XLA's norms read and write more than the fused ones, some 5 % of a step ({unfused})")
    norms = "" if not gpu else ", XLA's norms" if unfused else ", fused norms"
    # 3. matmuls
    if gpu and dtype != "bfloat16":
        slow.append(f"matmuls in {dtype}: several times slower than bfloat16, for which a card needs capability 8.0")
    if fp8 and gpu:
        _check_float8(device)
        if "--xla_gpu_enable_triton_gemm=false" not in os.environ.get("XLA_FLAGS", "").split():
            slow.append("products in bfloat16 despite --fp8: XLA_FLAGS needs --xla_gpu_enable_triton_gemm=false")
    # 4. collectives, and additions to memory
    if gpu:
        slow += missing_flags(device.device_kind, mesh.size)
    collectives = "no collectives" if mesh.size == 1 else f"collectives over {mesh.size} devices"
    line = f"{_ATTENTION[chosen]} ({why}){norms}, matmuls in {'float8 and ' if fp8 else ''}{dtype}, {collectives}"
    return Execution(line, tuple(slow))


def norms_refused(config: GPTConfig, device, wanted: bool) -> str:
    """Why the norms of a training step on this device are not the kernels of `model/fused.py`; empty if they are."""
    if device.platform not in ("gpu", "cuda") or "cuda" not in device.client.platform_version.lower():
        return "the device is no NVIDIA GPU"
    return fused.refusal(config) if wanted else "requested"


def _check_float8(device) -> None:
    capability = str(getattr(device, "compute_capability", ""))
    number = float(capability) if capability.replace(".", "").isdigit() else 0.0  # AMD's are names
    if number < float8.LEAST_CAPABILITY:
        raise DeviceError(
            f"--fp8 needs an NVIDIA GPU of compute capability {float8.LEAST_CAPABILITY} (Ada, Hopper, Blackwell), this "
            f"one has {capability or 'none'}: leave the flag out"
        )


def missing_flags(kind: str, devices: int) -> list[str]:
    """The flags that training sets for such a node and that this process lacks, as it does where XLA_FLAGS names a
    file. A flag that the user gave another value is none of them."""
    wanted: dict[str, str] = {}
    xla_flags.apply(kind, devices, environ=wanted)
    has = [flag.partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()]
    lacking = [flag for flag in wanted.get("XLA_FLAGS", "").split() if flag.partition("=")[0] not in has]
    return [f"XLA_FLAGS lacks {flag}; add it" for flag in lacking]


def announce(config: GPTConfig, mesh: Mesh, require_fast: bool, fp8: bool = False, fused_norms: bool = True) -> None:
    """Prints the line and what is slow. Raises DeviceError for the latter if only the fast way will do."""
    found = execution(config, mesh, fp8, fused_norms)
    print(f"execution: {found.line}")
    for reason in found.slow:
        print(f"slow: {reason}")
    if found.slow and require_fast:
        raise DeviceError(f"--require_fast: {'; '.join(found.slow)}")
