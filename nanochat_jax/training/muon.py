"""Muon: momentum, then an approximately orthogonalised update, for matrices (Jordan et al., "Muon", 2024).

Self-contained and useful outside this project: any pytree whose leaves are matrices or stacks of matrices
(..., rows, cols). Stacking equal shapes makes the orthogonalisation one batched matmul chain, and a stack sharded over
its leading axis needs no communication at all; zero matrices, such as the padding of a stack, stay zero.

Five parts that were found later are switches of `muon`, all off by default: MuonEq (`equilibrate`), Polar Express
(`orthogonalize`), Muon+ (`rescale`), NorMuon (`normalize_neurons`) and cautious weight decay (`decay`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Quintic coefficients that push singular values towards 1 fast without converging: after five steps they lie in about
# 0.7 .. 1.2, which trains as well as exact orthogonality (reference behaviour).
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPSILON = 1e-7
# One quintic per step, each the best for the interval that the one before it leaves, slightly damped for bfloat16
# (Amsel et al., "The Polar Express", arXiv:2505.16932; the reference's numbers).
POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_MARGIN, POLAR_EXPRESS_EPSILON = 1.01, 1e-6  # of the Frobenius norm that x is divided by first
GRAM_ASPECT = 2  # the Gram form costs 4 r + 14 small matmuls for five steps at aspect r, the plain one 10 r + 5
GRAM_STEPS = 3
KERNEL_LAYOUTS = ("in_out", "out_in")


class MuonState(NamedTuple):
    """`count` (int32 scalar): updates done so far. `momentum`: float32 buffers shaped like the parameters.
    `second_moment`: with NorMuon, one float32 number per row or per column of every matrix; None without."""

    count: jax.Array
    momentum: Any
    second_moment: Any = None


def default_ns_dtype() -> Any:
    """bfloat16 on accelerators, as the reference; float32 on CPU, where bfloat16 is no faster."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def aspect_scale(fan_in: int, fan_out: int) -> float:
    """sqrt(max(1, fan_out / fan_in)): keeps the size of the change in a layer's *output* the same for any shape."""
    return math.sqrt(max(1.0, fan_out / fan_in))


def orthogonalize(x: jax.Array, steps: int = 5, dtype: Any = None, *, polar_express: bool = False) -> jax.Array:
    """Newton-Schulz: replaces the singular values of x by values near 1, keeping its singular vectors.

    x (..., rows, cols), batched over the leading axes; returns the same shape in `dtype` (None: `default_ns_dtype()`).
    A zero matrix gives zero. In bfloat16 every operation is rounded on its own, matmuls and the norm accumulate in
    float32, and the polynomial is grouped as (cA)A: the reference's eager result to the bit. `polar_express` takes the
    five quintics of that name, grouped as c(AA). Raises ValueError for fewer than two axes, a step count that is
    negative or larger than the number of quintics, or a dtype other than float32 and bfloat16.
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize needs a matrix or a stack of matrices (..., rows, cols), got shape {x.shape}")
    if steps < 0 or (polar_express and steps > len(POLAR_EXPRESS_COEFFICIENTS)):
        most = f" and <= {len(POLAR_EXPRESS_COEFFICIENTS)} with polar_express" if polar_express else ""
        raise ValueError(f"Newton-Schulz needs steps >= 0{most}, got {steps}")
    dtype = jnp.dtype(default_ns_dtype() if dtype is None else dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"Newton-Schulz runs in float32 or bfloat16, got {dtype}")
    polynomials = [
        _Polynomial(*abc, polar_express)
        for abc in (POLAR_EXPRESS_COEFFICIENTS[:steps] if polar_express else [NS_COEFFICIENTS] * steps)
    ]
    tall = x.shape[-2] > x.shape[-1]
    x = _round(x.astype(jnp.float32), dtype)
    x = x.mT if tall else x  # the Gram matrix below is then the small one
    norm, epsilon = _round(frobenius_norm(_wide(x)), dtype), NS_EPSILON
    if polar_express:
        norm, epsilon = _round(POLAR_EXPRESS_MARGIN * _wide(norm), dtype), POLAR_EXPRESS_EPSILON
    x = _round(_wide(x) / _wide(_round(_wide(norm) + epsilon, dtype)), dtype)
    if dtype == jnp.float32 and x.shape[-1] >= GRAM_ASPECT * x.shape[-2]:
        x = _iterate_on_gram(x, polynomials)
    else:
        x = _iterate(x, polynomials)
    return x.mT if tall else x


class _Polynomial(NamedTuple):
    """a I + b A + c A A, with the last term grouped as c(AA) or as (cA)A, which rounds differently."""

    a: float
    b: float
    c: float
    square_first: bool

    def square(self, gram: jax.Array) -> jax.Array:
        """c A A."""
        if self.square_first:
            return _round(self.c * _wide(_matmul(gram, gram)), gram.dtype)
        return _matmul(_round(self.c * _wide(gram), gram.dtype), gram)


def _iterate(x: jax.Array, polynomials: list[_Polynomial]) -> jax.Array:
    """x <- a x + (b A + c A A) x with A = x x', rounding where the reference rounds."""
    for p in polynomials:
        gram = _matmul(x, x.mT)
        factor = _round(_wide(_round(p.b * _wide(gram), x.dtype)) + _wide(p.square(gram)), x.dtype)
        x = _round(_wide(_round(p.a * _wide(x), x.dtype)) + _wide(_matmul(factor, x)), x.dtype)
    return x


def _iterate_on_gram(x: jax.Array, polynomials: list[_Polynomial]) -> jax.Array:
    """The same iteration in float32, carried on with the small matrix A = x x' alone: a third fewer operations at 4:1.

    A step multiplies x by S = a I + b A + c A A and therefore A by S from both sides, so x itself is needed only at the
    end. Errors in A grow about twelvefold a step where x has no weight; a fresh A every GRAM_STEPS steps keeps the
    result as exact as the plain iteration (better than 1e-5 against float64, whatever the condition number), while
    without it 3e-4 is seen.
    """
    for start in range(0, len(polynomials), GRAM_STEPS):
        block = polynomials[start : start + GRAM_STEPS]
        gram, product = _matmul(x, x.mT), None
        for i, p in enumerate(block):
            identity = p.a * jnp.eye(x.shape[-2], dtype=x.dtype)
            factor = identity.reshape((1,) * (x.ndim - 2) + identity.shape) + p.b * gram + p.square(gram)
            product = factor if product is None else _matmul(factor, product)
            if i < len(block) - 1:
                gram = _matmul(_matmul(factor, gram), factor)
        x = _matmul(product, x)
    return x


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _round(x: jax.Array, dtype) -> jax.Array:
    """float32 to `dtype`. The explicit reduce_precision keeps XLA from fusing the rounding away as excess precision."""
    return x if dtype == jnp.float32 else jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(dtype)


def _matmul(x, y) -> jax.Array:
    """Batched matmul rounded once to the operands' dtype; in float32 without the TF32 shortcut of GPUs."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = jnp.matmul(x, y, precision=precision, preferred_element_type=x.dtype)
    return _round(_wide(product), x.dtype)  # XLA on CPU computes a bfloat16 product in float32 and would keep it so


# ---------------------------------------------------------------------------------------------------------------------
# the later parts; `axis` is that of the neurons (outputs): -1 for kernels (in, out), -2 for weights (out, in)


def frobenius_norm(x: jax.Array) -> jax.Array:
    """Of matrices (..., rows, cols) in float32, as (..., 1, 1)."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))


def equilibrate(x: jax.Array, axis: int, dtype: Any = None) -> jax.Array:
    """MuonEq: every neuron's weights scaled to the root mean square of all neurons' norms, in `dtype` as orthogonalize.

    A neuron whose norm is below 1e-6 is scaled as if it were 1e-6; zeros stay zeros.
    """
    dtype = jnp.dtype(default_ns_dtype() if dtype is None else dtype)
    x = _round(x.astype(jnp.float32), dtype)
    norms = jnp.sqrt(jnp.sum(jnp.square(_wide(x)), axis=_other(axis), keepdims=True))
    target = frobenius_norm(_wide(x)) / math.sqrt(x.shape[axis])
    return _round(_wide(x) * _wide(_round(target / jnp.maximum(norms, 1e-6), dtype)), dtype)


def rescale(x: jax.Array) -> jax.Array:
    """Muon+: matrices (..., rows, cols) with the Frobenius norm of an orthogonal one, sqrt(min(rows, cols))."""
    return x * (math.sqrt(min(x.shape[-2:])) / jnp.maximum(frobenius_norm(x), 1e-6))


def neurons_axis_of(shape: tuple[int, ...], axis: int) -> int:
    """Along which axis NorMuon keeps its second moments: the neurons', or the inputs' where these are more."""
    return axis if shape[axis] >= shape[_other(axis)] else _other(axis)


def second_moment_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Shape of NorMuon's buffer for matrices (..., rows, cols): (..., rows, 1) or (..., 1, cols)."""
    kept = neurons_axis_of(shape, axis)
    return (*shape[:-2], 1, shape[-1]) if kept == -1 else (*shape[:-1], 1)


def normalize_neurons(x: jax.Array, moment: jax.Array, beta2: float, axis: int) -> tuple[jax.Array, jax.Array]:
    """NorMuon (arXiv:2510.05491): (x with every neuron divided by its running root mean square, the new second moment).

    The Frobenius norm of x stays what it was. There is no bias correction: only ratios between neurons matter.
    """
    averaged = _other(neurons_axis_of(x.shape, axis))
    square = jnp.mean(jnp.square(x), axis=averaged, keepdims=True)
    moment = moment + (1 - beta2) * (square - moment)
    inverse = jax.lax.rsqrt(jnp.maximum(moment, 1e-10))
    count = x.shape[averaged]
    norm = jnp.sqrt(count * jnp.sum(square, axis=(-2, -1), keepdims=True))
    new_norm = jnp.sqrt(count * jnp.sum(square * jnp.square(inverse), axis=(-2, -1), keepdims=True))
    return x * (inverse * (norm / jnp.maximum(new_norm, 1e-10))), moment


def decay(update: jax.Array, param: jax.Array, rate: Any, scale: float, cautious: bool) -> jax.Array:
    """update - rate * param, in float32. rate: learning rate times weight decay; update: what is added to param.

    cautious (arXiv:2510.12402): only where the update does not make the parameter larger (a zero update counts), and
    times `scale`, the aspect factor that the update has.
    """
    update, param = update.astype(jnp.float32), param.astype(jnp.float32)
    if not cautious:
        return update - rate * param
    return update - (rate * scale) * jnp.where(update * param <= 0, param, 0.0)


def _other(axis: int) -> int:
    return -3 - axis


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    *,
    ns_dtype: Any = None,
    kernel_layout: str = "in_out",
    update_scale: Callable[[int, int], float] = aspect_scale,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    muon_eq: bool = False,
    polar_express: bool = False,
    muon_plus: bool = False,
    normuon: bool = False,
    beta2: float = 0.9,
    cautious: bool = False,
) -> optax.GradientTransformation:
    """The Muon optimizer for a pytree of matrices or stacks of matrices.

    Per matrix: m = mu m + (1 - mu) g (an average, not a sum); u = (1 - mu) g + mu m with Nesterov, else m; the update
    is -learning_rate * (update_scale(fan_in, fan_out) * orthogonalize(u) + weight_decay * parameter).

    learning_rate, momentum, weight_decay: numbers, or callables of the number of updates done so far (0 at the first).
    kernel_layout: "in_out" for y = x @ kernel (Flax), "out_in" for y = x @ kernel.T (PyTorch): which axis is fan_in.
    update_scale: default sqrt(max(1, fan_out / fan_in)). ns_dtype: see `orthogonalize`. State and arithmetic outside
    the iteration are float32. A zero gradient with a zero buffer gives a zero update, decay apart. Raises ValueError
    naming the leaf that is no matrix.

    The switches change one step each: muon_eq: `equilibrate` before, polar_express: other quintics within, muon_plus:
    `rescale` after, normuon with beta2: `normalize_neurons` after that; cautious: see `decay`.
    """
    if kernel_layout not in KERNEL_LAYOUTS:
        raise ValueError(f"kernel_layout must be one of {KERNEL_LAYOUTS}, got {kernel_layout!r}")
    axis = -1 if kernel_layout == "in_out" else -2

    def init(params) -> MuonState:
        _require_matrices(params)
        buffers = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        moments = jax.tree.map(lambda p: jnp.zeros(second_moment_shape(p.shape, axis), jnp.float32), params)
        return MuonState(jnp.zeros((), jnp.int32), buffers, moments if normuon else None)

    def update(updates, state: MuonState, params=None):
        if weight_decay and params is None:
            raise ValueError("muon with weight_decay needs the parameters: call update(grads, state, params)")
        _require_matrices(updates)
        lr, mu, wd = (_at(value, state.count) for value in (learning_rate, momentum, weight_decay))
        # m + (1 - mu)(g - m), twice: the reference's interpolation, also in how it rounds
        buffers = jax.tree.map(lambda m, g: m + (1 - mu) * (g.astype(jnp.float32) - m), state.momentum, updates)

        def one(grad, buffer, moment, param):
            x = buffer + (1 - mu) * (grad.astype(jnp.float32) - buffer) if nesterov else buffer
            if muon_eq:
                x = equilibrate(x, axis, ns_dtype)
            x = orthogonalize(x, ns_steps, ns_dtype, polar_express=polar_express).astype(jnp.float32)
            if muon_plus:
                x = rescale(x)
            if normuon:
                x, moment = normalize_neurons(x, moment, beta2, axis)
            scale = update_scale(grad.shape[_other(axis)], grad.shape[axis])
            step = -lr * (x * scale)
            if weight_decay:
                step = decay(step, param, lr * wd, scale, cautious)
            return step.astype(grad.dtype if param is None else param.dtype), moment

        leaves, tree = jax.tree.flatten(updates)
        trees = (buffers, state.second_moment, params)
        columns = [[None] * len(leaves) if t is None else tree.flatten_up_to(t) for t in trees]
        done = [one(*row) for row in zip(leaves, *columns, strict=True)]
        out, moments = (tree.unflatten([pair[i] for pair in done]) for i in range(2))
        count: Any = optax.safe_increment(state.count)
        return out, MuonState(count, buffers, moments if normuon else None)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _at(value, count) -> jax.Array:
    return jnp.asarray(value(count) if callable(value) else value, jnp.float32)


def _require_matrices(tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.ndim < 2:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"muon works on matrices (..., rows, cols), but {name or 'the parameter'} has shape {leaf.shape}; "
                "give vectors and scalars to another optimizer (optax.partition)"
            )
