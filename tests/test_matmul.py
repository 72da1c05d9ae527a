"""`project`: the product and its gradient, with the kernel for few rows and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rustbpe
from nanochat_jax import matmul

needs_kernel = pytest.mark.skipif(rustbpe.skinny_matmul() is None, reason="this processor has no AVX2")


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def custom_calls(function, *args) -> int:
    return jax.jit(function).lower(*args).as_text().count("stablehlo.custom_call @skinny_matmul")


@pytest.mark.parametrize("rows", [(1,), (2,), (8,), (16,), (17,), (1, 1), (8, 1), (3, 5), (1, 16), (2, 2, 2)])
@pytest.mark.parametrize("inner, outer", [(1, 1), (5, 7), (33, 65), (256, 1024), (100, 513), (64, 9001)])
def test_it_is_the_product(rows, inner, outer):
    x, kernel = arrays((*rows, inner), (inner, outer))
    y = jax.jit(matmul.project)(x, kernel)
    assert y.shape == (*rows, outer) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ kernel.astype(np.float64), rtol=1e-5, atol=2e-5 * inner**0.5)


@needs_kernel
def test_the_kernel_serves_2_to_16_rows_of_float32():
    kernel = jnp.ones((32, 64))
    used = [rows for rows in range(1, 40) if custom_calls(matmul.project, jnp.ones((rows, 32)), kernel)]
    assert used == list(range(2, 17))
    assert not custom_calls(matmul.project, jnp.ones((8, 32), jnp.bfloat16), kernel.astype(jnp.bfloat16))


@needs_kernel
def test_other_platforms_get_a_plain_product():
    traced = jax.jit(matmul.project).trace(jnp.ones((8, 32)), jnp.ones((32, 64)))
    assert "skinny" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "skinny" not in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_kernel
def test_a_row_does_not_depend_on_its_company():
    x, kernel = arrays((16, 300), (300, 1100))
    together = np.asarray(matmul.project(x, kernel))
    for rows in range(2, 16):
        np.testing.assert_array_equal(matmul.project(x[:rows], kernel), together[:rows])


@needs_kernel
@pytest.mark.parametrize("x_spec, kernel_spec", [(("d",), ()), ((None, "d"), ("d",)), ((), (None, "d"))])
def test_sharded_arrays_give_the_same_product(x_spec, kernel_spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x, kernel = arrays((16, 64), (64, 128))
    at = [jax.NamedSharding(mesh, jax.P(*spec)) for spec in (x_spec, kernel_spec)]
    assert custom_calls(matmul.project, x, kernel) == 1
    y = jax.jit(matmul.project)(jax.device_put(x, at[0]), jax.device_put(kernel, at[1]))
    np.testing.assert_array_equal(y, matmul.project(x, kernel))


@needs_kernel
def test_it_is_right_when_called_again_and_again_in_a_loop():
    x, kernel = arrays((8, 256), (256, 256))
    kernel /= 16

    def repeat(x):
        return jax.lax.fori_loop(0, 500, lambda _, x: jnp.tanh(matmul.project(x, kernel) * 1.5), x)

    jitted = jax.jit(repeat)
    first = np.asarray(jitted(x))
    assert custom_calls(repeat, x) == 1
    for _ in range(5):  # threads share the work differently each time: same bits
        np.testing.assert_array_equal(jitted(x), first)
    short = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(matmul.project(x, kernel) * 1.5), x))
    rows = np.concatenate([short(x[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(short(x), rows, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_gradient_and_vmap(rows):
    x, kernel = arrays((rows, 24), (24, 36))

    def value(f):
        return jax.grad(lambda x, kernel: jnp.sin(f(x, kernel)).sum(), (0, 1))(x, kernel)

    for mine, plain in zip(value(matmul.project), value(jnp.matmul), strict=True):
        np.testing.assert_allclose(mine, plain, atol=1e-4)
    several = np.stack([x, 2 * x])
    np.testing.assert_allclose(
        jax.vmap(matmul.project, (0, None))(several, kernel), np.matmul(several, kernel), atol=1e-4
    )
