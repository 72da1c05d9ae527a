"""Products with a weight matrix in float8, each tensor scaled as a whole (Micikevicius and others, arXiv:2209.05433).

Forward both operands are E4M3, in the backward pass the gradient is E5M2, which has more range and less precision. The
scale comes from the largest value there is now; no history is kept. What is written here is "round, undo the scale in
bfloat16, multiply": XLA makes one float8 product of cuBLASLt of it (`__cublas$lt$matmul$f8`), where its own kernels do
not take the product first (`--xla_gpu_enable_triton_gemm=false`, which `xla_flags` sets). Elsewhere it is what it says,
which is how float8 training is tried out on a CPU.
"""

import jax
import jax.numpy as jnp

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MULTIPLE = 16  # of the sides of a matrix that cuBLASLt multiplies in float8
LEAST_CAPABILITY = 8.9  # of the NVIDIA GPUs that do


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a kernel (in, out) of this shape can be multiplied in float8."""
    return all(size % MULTIPLE == 0 for size in shape)


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (..., in) @ kernel (in, out) in x's dtype; both sides rounded to float8."""
    return _forward(x, kernel)[0]


def _forward(x, kernel):
    flat = x.reshape(-1, x.shape[-1])
    left, right = _rounded(flat, E4M3), _rounded(kernel, E4M3)
    y = _product(left, right, ((1,), (0,)), x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[1]), (left, right)


def _backward(residuals, d_out):
    left, right = residuals
    d = _rounded(d_out.reshape(-1, d_out.shape[-1]), E5M2)
    d_x = _product(d, right, ((1,), (1,)), d_out.dtype)
    d_kernel = _product(left, d, ((0,), (0,)), d_out.dtype)
    return d_x.reshape(*d_out.shape[:-1], d_x.shape[-1]), d_kernel


project.defvjp(_forward, _backward)


def _rounded(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """x in a float8 dtype whose range it fills, and the number that undoes the scale."""
    most = float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale = jnp.where(largest == 0, 1.0, most / largest)  # of a NaN: all is NaN, and the step is rejected
    scaled = jnp.clip(x.astype(jnp.float32) * scale, -most, most)
    return scaled.astype(dtype), 1.0 / scale


def _product(left, right, contracted, dtype):
    left, right = (values.astype(dtype) * undo.astype(dtype) for values, undo in (left, right))
    return jax.lax.dot_general(left, right, (contracted, ((), ())), preferred_element_type=dtype)
