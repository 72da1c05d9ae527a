"""Products with a weight matrix, quick also for the few rows of a decoding step.

XLA on CPU reads the weights only half as fast for a few rows as memory delivers them. There a kernel of our own takes
over (`rustbpe/src/cpu_kernels/small_batch_matmul.rs`), for float32. Everywhere else this is `jnp.matmul`, also where
the kernel cannot run.
Sharded arrays would be gathered for the kernel (right, but slow); so few rows are sharded nowhere but in tests.
"""

import math

import jax
import jax.numpy as jnp

from nanochat_jax.hardware import cpu_kernels

# Entries of a matrix from which on the kernel is used: it is faster from about there (decoding 1.1 to 1.3 times against
# 2^18). And somewhere between 2^14 and 2^16 XLA begins to sum in another order for several rows than for one, and the
# kernel sums in that of one: results are batch-invariant (up to `rustbpe.skinny_rows()` rows).
LARGE = 1 << 15


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (..., in) @ kernel (in, out)."""
    return project_each(x, [kernel])[0]


@jax.custom_vjp
def project_each(x: jax.Array, kernels: list[jax.Array]) -> list[jax.Array]:
    """x (..., in) @ each kernel (in, out), with the gradients written out over one flat axis of tokens.

    Same arithmetic as what `jax.grad` derives, but as two plain matrix products a kernel: left to itself XLA on CPU
    forms the kernel's gradient transposed and copies the activations for it (a block of depth 4 took 15% longer). The
    gradient of x is summed product by product, each plus the sum so far, which cuBLAS does in passing: written the
    other way around, the last addition is another pass over memory.
    """
    return [_product(x, kernel) for kernel in kernels]


def _product(x, kernel):
    rows = math.prod(x.shape[:-1])
    # one row is a product with a vector, which XLA does at full speed
    eligible = rows > 1 and kernel.size >= LARGE and x.dtype == kernel.dtype == jnp.float32
    if eligible and rows <= cpu_kernels.skinny_rows():
        flat = x.reshape(rows, x.shape[-1])
        y = jax.lax.platform_dependent(flat, kernel, cpu=_skinny, default=jnp.matmul)
        return y.reshape(*x.shape[:-1], kernel.shape[1])
    return jnp.matmul(x, kernel)


def _skinny(x, kernel):
    out = jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("skinny_matmul", out, vmap_method="sequential")(x, kernel)


def _project_fwd(x, kernels):
    return project_each(x, kernels), (x, kernels)


def _project_bwd(residuals, d_outs):
    x, kernels = residuals
    flat_x = x.reshape(-1, x.shape[-1])
    flat_ds = [d.reshape(-1, d.shape[-1]) for d in d_outs]
    d_x = jnp.matmul(flat_ds[-1], kernels[-1].T)
    for d, kernel in zip(flat_ds[-2::-1], kernels[-2::-1], strict=True):
        d_x = jnp.matmul(d, kernel.T) + d_x
    return d_x.reshape(x.shape), [jnp.matmul(flat_x.T, d) for d in flat_ds]


project_each.defvjp(_project_fwd, _project_bwd)
