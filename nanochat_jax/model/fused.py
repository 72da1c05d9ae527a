"""The norms of a block on NVIDIA GPUs, each one pass over memory forward and one backward: Pallas kernels, by Triton.

Functions of the same names, arguments and results as in `layers`, which say what is computed; here in float32 up to the
one rounding at the end. XLA makes two or three kernels of each (a sum over a row, then what is done with it) and reads
the row again in every one, twice forward and four times backward.

Every kernel works on one row at a time: a token, of width C or (heads, D). What Triton loads must have a power
of two of entries; those beyond the row are masked.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.layers import NORM_EPS

INTERPRET = False  # run the kernels step by step on any device, as tests do


def refusal(config: GPTConfig) -> str:
    """Why the kernels do not take a model; empty if they do."""
    if config.dtype != jnp.bfloat16:
        return f"they are for bfloat16, these activations are {config.dtype}"
    half = config.head_dim // 2
    return "" if half == _power_of_two(half) else f"half a head, {half}, is no power of two"


# ---------------------------------------------------------------------------------------------------------------------
# the norm, beside what is normed


@jax.named_scope("norm")
def with_norm(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _with_norm(x)


@jax.custom_vjp
def _with_norm(x):
    return _with_norm_fwd(x)[0]


def _with_norm_fwd(x):
    y, scale = _by_rows(_norm_kernel, [x], [_like(x), _numbers(x)])
    return (x, y), (y, scale)


def _with_norm_bwd(residuals, d):
    (d_x,) = _by_rows(_norm_backward_kernel, [*d, *residuals], [_like(d[0])])
    return (d_x,)


_with_norm.defvjp(_with_norm_fwd, _with_norm_bwd)


def _norm_kernel(x, y, scale):
    x = _load(x)
    scale[0] = s = _scale(x, y.shape[0])
    _store(y, x * s)


def _norm_backward_kernel(d_x_beside, d_y, y, scale, d_x):
    _store(d_x, _load(d_x_beside) + _norm_gradient(_load(d_y), _load(y), scale[0], y.shape[0]))


@jax.custom_vjp
def _mixed_with_norm(x, x0, factors):
    return _mixed_fwd(x, x0, factors)[0]


@jax.named_scope("norm")
def mixed_with_norm(x: jax.Array, x0: jax.Array, factors) -> tuple[jax.Array, jax.Array, jax.Array]:
    if factors is None:
        x, y = _with_norm(x)
        return x, x0, y
    return _mixed_with_norm(x, x0, factors)


def _mixed_fwd(x, x0, factors):
    pair = jnp.stack(factors)[None]
    mixed, y, scale = _by_rows(_mixed_kernel, [x, x0, pair], [_like(x), _like(x), _numbers(x)])
    return (mixed, x0, y), (x, x0, pair, y, scale)


def _mixed_bwd(residuals, d):
    like = residuals[0]
    outputs = [_like(like), _like(like), _numbers(like), _numbers(like)]
    d_x, d_x0, d_first, d_second = _by_rows(_mixed_backward_kernel, [*d, *residuals], outputs)
    return d_x, d_x0, (jnp.sum(d_first), jnp.sum(d_second))


_mixed_with_norm.defvjp(_mixed_fwd, _mixed_bwd)


def _mixed_kernel(x, x0, factors, mixed, y, scale):
    rounded = (factors[0] * _load(x) + factors[1] * _load(x0)).astype(mixed.dtype)
    _store(mixed, rounded)
    rounded = rounded.astype(jnp.float32)
    scale[0] = s = _scale(rounded, y.shape[0])
    _store(y, rounded * s)


def _mixed_backward_kernel(d_mixed, d_x0_beside, d_y, x, x0, factors, y, scale, d_x, d_x0, d_first, d_second):
    d = _load(d_mixed) + _norm_gradient(_load(d_y), _load(y), scale[0], y.shape[0])
    _store(d_x, factors[0] * d)
    _store(d_x0, _load(d_x0_beside) + factors[1] * d)
    d_first[0] = jnp.sum(d * _load(x))  # of this row; the sum over rows is XLA's
    d_second[0] = jnp.sum(d * _load(x0))


def _scale(x, size):
    return jax.lax.rsqrt(jnp.sum(x * x) / size + NORM_EPS)


def _norm_gradient(d, y, scale, size):
    return scale * (d - y * (jnp.sum(d * y) / size))


# ---------------------------------------------------------------------------------------------------------------------
# rotary embedding, then the norm of every head


def rotary_norm(x: jax.Array, cos: jax.Array, sin: jax.Array, factor: float) -> jax.Array:
    return _rotary_norm(x, cos, sin, factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotary_norm(x, cos, sin, factor):
    return _rotary_fwd(x, cos, sin, factor)[0]


def _rotary_fwd(x, cos, sin, factor):
    tables = [table.astype(x.dtype).reshape(-1, table.shape[-1]) for table in (cos, sin)]
    kernel = functools.partial(_rotary_kernel, factor=factor)
    y, scale = _by_rows(kernel, [x, *tables], [_like(x), _numbers(x, x.shape[2])])
    return y, (y, scale, *tables)


def _rotary_bwd(factor, residuals, d):
    kernel = functools.partial(_rotary_backward_kernel, factor=factor)
    (d_x,) = _by_rows(kernel, [d, *residuals], [_like(d)])
    return d_x, None, None


_rotary_norm.defvjp(_rotary_fwd, _rotary_bwd)


def _rotary_kernel(x, cos, sin, y, scale, *, factor):
    first, second, cos, sin = _load(x, 0), _load(x, 1), _load(cos)[None], _load(sin)[None]
    first, second = first * cos + second * sin, second * cos - first * sin
    squares = jnp.sum(first * first + second * second, axis=1)
    s = jax.lax.rsqrt(squares / x.shape[1] + NORM_EPS)
    _store(scale, s)
    _store(y, first * (s * factor)[:, None], 0)
    _store(y, second * (s * factor)[:, None], 1)


def _rotary_backward_kernel(d_y, y, scale, cos, sin, d_x, *, factor):
    d_first, d_second, first, second = _load(d_y, 0), _load(d_y, 1), _load(y, 0), _load(y, 1)
    mean = jnp.sum(d_first * first + d_second * second, axis=1) / y.shape[1]
    s = _load(scale)[:, None]
    # y is the norm times the factor, and so is its gradient
    d_first = s * (factor * d_first - first * (mean / factor)[:, None])
    d_second = s * (factor * d_second - second * (mean / factor)[:, None])
    cos, sin = _load(cos)[None], _load(sin)[None]
    _store(d_x, d_first * cos - d_second * sin, 0)
    _store(d_x, d_second * cos + d_first * sin, 1)


# ---------------------------------------------------------------------------------------------------------------------
# one program a row


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _numbers(x: jax.Array, per_row: int = 1) -> jax.ShapeDtypeStruct:
    """So many float32 numbers for every token of x (B, T, ...)."""
    return jax.ShapeDtypeStruct((*x.shape[:2], per_row), jnp.float32)


def _by_rows(kernel, inputs, outputs) -> list[jax.Array]:
    """The results of `kernel(*inputs, *outputs)` for every row. Rows are the first two axes of what has three or more;
    of the rest, (n, k), row i sees number i mod n."""
    flat = [x.reshape(-1, *x.shape[2:]) if x.ndim > 2 else x for x in inputs]
    shapes = [jax.ShapeDtypeStruct((o.shape[0] * o.shape[1], *o.shape[2:]), o.dtype) for o in outputs]
    rows, entries = shapes[0].shape[0], max(_power_of_two(s.size // s.shape[0]) for s in shapes)

    def row(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, n=x.shape[0], zeros=(0,) * (x.ndim - 1): (i % n, *zeros))

    results = pl.pallas_call(
        kernel,
        grid=(rows,),
        in_specs=[row(x) for x in flat],
        out_specs=[row(s) for s in shapes],
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=4 if entries <= 2048 else 8, num_stages=1),
        interpret=INTERPRET,
    )(*flat)
    return [r.reshape(o.shape) for r, o in zip(results, outputs, strict=True)]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _view(ref, half):
    """A row (n,), or one half of a row (heads, D) along D, filled up to a power of two; and which entries are real."""
    n = ref.shape[0]
    padded = _power_of_two(n)
    at = (jnp.arange(padded),)  # numbers, since jax 0.12 refuses slices that end beyond the row
    if half is not None:
        width = ref.shape[1] // 2
        columns = half * width + jnp.arange(width)
        at = tuple(jnp.broadcast_to(x, (padded, width)) for x in (at[0][:, None], columns[None]))
    return ref.at[at], at[0] < n if padded > n else None


def _load(ref, half: int | None = None) -> jax.Array:
    view, mask = _view(ref, half)
    return triton.load(view, mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)


def _store(ref, values, half: int | None = None) -> None:
    view, mask = _view(ref, half)
    triton.store(view, values.astype(ref.dtype), mask=mask)
