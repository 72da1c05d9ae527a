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


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (..., in) @ kernel (in, out), with its gradient written out over one flat axis of tokens.

    Same arithmetic as what `jax.grad` derives, but as two plain matrix products: left to itself XLA on CPU forms the
    kernel's gradient transposed and copies the activations for it (a block of depth 4 took 15% longer).
    """
    return _product(x, kernel)


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


def _project_fwd(x, kernel):
    return _product(x, kernel), (x, kernel)


def _project_bwd(residuals, d_out):
    x, kernel = residuals
    flat_x, flat_d = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    return jnp.matmul(flat_d, kernel.T).reshape(x.shape), jnp.matmul(flat_x.T, flat_d)


project.defvjp(_project_fwd, _project_bwd)
