"""How many rows fit on a device: the real programs are compiled, and their memory is read, before anything runs.

XLA plans the memory of a program when it compiles it, so what a step needs is known to the byte beforehand; only the
allocator's fragmentation is not, for which a margin is left. The largest power of two is taken, and the tokens per step
stay what they were by accumulation: the mathematics is the same for every choice.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, SingleDeviceSharding

from nanochat_jax.evals.bpb import loss_sums_fn
from nanochat_jax.hardware.devices import is_out_of_memory
from nanochat_jax.inference import model_runner, programs
from nanochat_jax.model import gpt
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.joined_qkv import join_qkv
from nanochat_jax.model.kv_cache import KVSlots
from nanochat_jax.model.kv_in_place import IN_PLACE, decode_access
from nanochat_jax.parallel import sharding
from nanochat_jax.training.step import abstract_state
from nanochat_jax.utils.errors import InputError, UserError

MARGIN = 0.03  # of the memory, left for what the allocator cannot place


class DoesNotFit(UserError, RuntimeError):
    """Not even the smallest batch fits; the message says what to change."""


# ---------------------------------------------------------------------------------------------------------------------
# the choice


@dataclass(frozen=True)
class BatchChoice:
    """rows: per device and micro-step. needed: bytes per device of every size compiled (None: the compiler itself ran
    out of memory). limit: bytes there are; the margin comes off it."""

    rows: int
    needed: dict[int, int | None]
    limit: int

    def describe(self, total_rows: int) -> str:
        """One line for a person; total_rows: rows per device and optimizer step."""
        tried = ", ".join(
            f"{rows} {'runs out of memory' if n is None else f'needs {gib(n)}'}"
            for rows, n in sorted(self.needed.items())
        )
        fit = f"of {gib(self.limit)}, {MARGIN:.0%} of it kept free"
        return (
            f"device batch size: {self.rows} rows x {total_rows // self.rows} accumulated ({tried} {fit})"
            if self.needed
            else f"device batch size: {self.rows} rows (the only one possible)"
        )


def gib(n: float) -> str:
    return f"{n / 2**30:.1f} GiB"


def bytes_needed(analysis: Any) -> int:
    """What a program needs on its device, from `compiled.memory_analysis()`: results that take over the place of a
    donated argument count once."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )


def sizes(total_rows: int) -> list[int]:
    """The powers of two that divide the rows per device and optimizer step, smallest first.

    Raises ValueError where there is no row for a device.
    """
    if total_rows < 1:
        raise InputError(
            "each device must get at least one row per step: raise --total_batch_size or use fewer devices"
        )
    return [1 << k for k in range(total_rows.bit_length()) if total_rows % (1 << k) == 0]


def choose(
    total_rows: int,
    measure: Callable[[int], int | None],
    limit: int,
    guess: Callable[[int], float] | None = None,
) -> BatchChoice:
    """The largest size that fits the limit less the margin.

    measure(rows) compiles a step and returns its bytes, or None if that ran out of memory; it is asked as seldom as
    possible: first for the largest size that `guess` (estimated bytes) thinks to fit, then upwards or downwards until
    both sides are known. More rows are taken to need more memory. Raises DoesNotFit if one row does not fit.
    """
    allowed = limit * (1 - MARGIN)
    candidates = sizes(total_rows)
    needed: dict[int, int | None] = {}

    def fits(rows: int) -> bool:
        needed[rows] = n = measure(rows)
        return n is not None and n <= allowed

    hopeful = [rows for rows in candidates if guess is None or guess(rows) <= allowed]
    at = candidates.index(hopeful[-1]) if hopeful else 0
    if fits(candidates[at]):
        while at + 1 < len(candidates) and fits(candidates[at + 1]):
            at += 1
    else:
        at -= 1
        while at >= 0 and not fits(candidates[at]):
            at -= 1
    if at < 0:
        n = needed[candidates[0]]
        raise DoesNotFit(
            f"a step with one row per device needs {gib(n) if n is not None else 'more memory than there is'}, and "
            f"{gib(allowed)} are free. Recompute activations (--remat=block), shard the parameters over the devices "
            "(--fsdp), use shorter rows (--max_seq_len) or a smaller --depth"
        )
    return BatchChoice(candidates[at], needed, limit)


def halved(rows: int) -> int:
    """The next size to try after `rows` ran out of memory. Raises DoesNotFit below one row."""
    if rows <= 1:
        raise DoesNotFit(
            "the device ran out of memory with one row per micro-step; use --remat=block, a shorter --max_seq_len or a "
            "smaller --depth"
        )
    return rows // 2


def free_memory(device: Any) -> int | None:
    """Bytes a program may use on the device: its pool less what is in use. None where it does not say (CPU)."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def least_free_memory() -> int | None:
    """`free_memory` of the device of the whole job that has least; None where one does not say."""
    here = [free_memory(device) for device in jax.local_devices()]
    least = min((n for n in here if n is not None), default=None) if None not in here else None
    if jax.process_count() == 1:
        return least
    everywhere = multihost_utils.process_allgather(np.int64(-1 if least is None else least))
    return int(everywhere.min()) if everywhere.min() >= 0 else None


@contextlib.contextmanager
def _no_persistent_cache():
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether it is used is asked once only
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def measured(lower: Callable[[], Any]) -> int | None:
    """Compiles what `lower` returns and reads its memory; None if the compiler runs out of it.

    A program that comes from the persistent cache may have lost its plan of memory: it is then compiled anew.
    """
    try:
        analysis = lower().compile().memory_analysis()
        if analysis is None:
            with _no_persistent_cache():
                analysis = lower().compile().memory_analysis()
        if analysis is None:
            raise DoesNotFit("the device does not say what a program needs: give --device_batch_size a number")
        return bytes_needed(analysis)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


# ---------------------------------------------------------------------------------------------------------------------
# the programs


def lower_step(step: Any, config: GPTConfig, optimizer: Any, mesh: Mesh, rows: int, accumulation: int, T: int):
    """The jitted, guarded train step `step`, lowered for `rows` rows a device, `accumulation` micro-steps, T tokens."""
    shape = accumulation, rows * sharding.row_shards(mesh), T
    tokens, limits = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct((2,), jnp.float32)
    state = abstract_state(config, optimizer, mesh)
    return step.lower(state, tokens, tokens, jax.ShapeDtypeStruct(shape, jnp.float32), limits)


def lower_evaluation(config: GPTConfig, mesh: Mesh, rows: int, T: int):
    """The held-out loss, lowered for `rows` rows a device."""
    tokens = jax.ShapeDtypeStruct((rows * mesh.size, T), jnp.int32)
    whole = sharding.named(mesh, sharding.replicated_spec())
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), gpt.abstract(config))
    return loss_sums_fn(config, mesh).lower(
        params, tokens, tokens, jax.ShapeDtypeStruct((config.vocab_size,), jnp.int32)
    )


def lower_sampling(
    config: GPTConfig,
    device: Any,
    slots: int,
    capacity: int,
    max_new_steps: int = 16,
    ends: int = 2,
):
    """The decoder's program that needs most memory on one device: `max_new_steps` tokens in each of the slots, of which
    the largest part is copied that ever is, where any is."""
    length = model_runner.slot_length(capacity, max_new_steps)
    here = SingleDeviceSharding(device)

    def on_device(tree, dtype=None):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=here), tree)

    shape = config.n_layer, slots, config.n_kv_head, length, config.head_dim
    storage = jax.eval_shape(lambda: KVSlots.create(*shape, config.dtype))
    row_slots = jax.ShapeDtypeStruct((slots,), jnp.int32)
    rows = jax.ShapeDtypeStruct((slots, programs.N_COLUMNS + max_new_steps), jnp.int32)
    control = jax.ShapeDtypeStruct((1, programs.N_CONTROL + ends), jnp.int32)
    adjustments = (jax.ShapeDtypeStruct((slots, config.vocab_size), dtype) for dtype in (jnp.float32, jnp.int32))
    others = map(on_device, (storage, row_slots, rows, control, *adjustments))
    access = decode_access(config, device.platform)
    params = gpt.abstract(config)
    if access in IN_PLACE:
        params = jax.eval_shape(join_qkv, params)
    arguments = on_device(params, config.dtype), *others
    visible = model_runner.largest_copy(length) if access == "copied" else capacity
    how: Any = dict(visible=visible, max_new_steps=max_new_steps, access=access)
    return programs.decode.lower(gpt, config, *arguments, **how)


def check_all(programs: Sequence[tuple[str, Callable[[], Any], int]], limit: int) -> None:
    """Compiles programs that will run later, (name, lower, bytes that lie on the device beside its arguments).

    Raises DoesNotFit for those that do not fit the limit: better now than after hours of training.
    """
    lines = []
    for name, lower, beside in programs:
        n = measured(lower)
        if n is None or n + beside > limit:
            need = "more memory than there is" if n is None else gib(n + beside)
            lines.append(f"{name} would need {need} of {gib(limit)}")
    if lines:
        raise DoesNotFit(
            f"{'; '.join(lines)}: give a smaller --device_batch_size (an evaluation) or fewer --slots (sampling)"
        )
