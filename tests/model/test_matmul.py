"""`project`: the product and its gradient, with the kernel for few rows and without."""

import ctypes
import logging
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.hardware import cpu_kernels
from nanochat_jax.model import linear
from tests import children
from tests.skips import NOT_BUILT

rustbpe = pytest.importorskip("rustbpe", reason=NOT_BUILT)
pytestmark = pytest.mark.usefixtures("optimized")  # what is compared to the bit
needs_kernel = pytest.mark.skipif(rustbpe.skinny_matmul() is None, reason="needs AVX2")


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


@pytest.fixture
def any_size(monkeypatch):
    """The kernel serves matrices of every size, so that tests can use small ones."""
    monkeypatch.setattr(linear, "LARGE", 0)


@pytest.fixture
def undecided():
    """Whether the kernel can run is decided in the test, and again after it."""
    cpu_kernels.available.cache_clear()
    yield
    cpu_kernels.available.cache_clear()


def project(x, kernel):
    """A function of its own for every call, for JAX keeps what it has compiled by function."""
    return jax.jit(lambda x, kernel: linear.project(x, kernel))(x, kernel)


def custom_calls(function, *args) -> int:
    return jax.jit(function).lower(*args).as_text().count("stablehlo.custom_call @skinny_matmul")


@pytest.mark.parametrize("rows", [(1,), (2,), (8,), (33,), (64,), (65,), (3, 5), (2, 2, 2)])
@pytest.mark.parametrize("inner, outer", [(1, 1), (33, 65), (100, 513), (64, 9001)])
def test_it_is_the_product(any_size, rows, inner, outer):
    x, kernel = arrays((*rows, inner), (inner, outer))
    y = project(x, kernel)
    assert y.shape == (*rows, outer) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ kernel.astype(np.float64), rtol=1e-5, atol=2e-5 * inner**0.5)


@needs_kernel
def test_the_kernel_serves_a_few_rows_of_a_large_float32_matrix():
    kernel = jnp.ones((256, 1024))
    most = rustbpe.skinny_rows()
    for rows in (1, 2, 3, 33, most, most + 1, 80):
        assert custom_calls(linear.project, jnp.ones((rows, 256)), kernel) == (2 <= rows <= most)
    assert not custom_calls(linear.project, jnp.ones((8, 256), jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert not custom_calls(linear.project, jnp.ones((8, 128)), jnp.ones((128, 255)))


@needs_kernel
def test_other_platforms_get_a_plain_product():
    traced = jax.jit(linear.project).trace(jnp.ones((8, 256)), jnp.ones((256, 1024)))
    assert "skinny" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "skinny" not in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_kernel
@pytest.mark.parametrize("inner, outer", [(64, 64), (128, 255), (128, 256), (300, 1100), (768, 768)])
def test_a_product_is_batch_invariant(inner, outer):
    """Below `LARGE` XLA's product has the same bits for all these numbers of rows, above the kernel has those of XLA's
    product of one row."""
    x, kernel = arrays((rustbpe.skinny_rows(), inner), (inner, outer))
    together = np.asarray(project(x, kernel))
    for rows in (1, 2, 3, 7, 8, 16, 33, 63):
        np.testing.assert_array_equal(project(x[:rows], kernel), together[:rows])


@needs_kernel
@pytest.mark.parametrize("x_spec, kernel_spec", [(("d",), ()), ((None, "d"), ("d",)), ((), (None, "d"))])
def test_sharded_arrays_give_the_same_product(any_size, x_spec, kernel_spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x, kernel = arrays((16, 64), (64, 128))
    at = [jax.NamedSharding(mesh, jax.P(*spec)) for spec in (x_spec, kernel_spec)]
    assert custom_calls(linear.project, x, kernel) == 1
    y = jax.jit(linear.project)(jax.device_put(x, at[0]), jax.device_put(kernel, at[1]))
    np.testing.assert_array_equal(y, linear.project(x, kernel))


@needs_kernel
def test_it_is_right_when_called_again_and_again_in_a_loop(any_size):
    x, kernel = arrays((8, 256), (256, 256))
    kernel /= 16

    def repeat(x):
        return jax.lax.fori_loop(0, 500, lambda _, x: jnp.tanh(linear.project(x, kernel) * 1.5), x)

    jitted = jax.jit(repeat)
    first = np.asarray(jitted(x))
    assert custom_calls(repeat, x) == 1
    for _ in range(5):  # threads share the work differently each time: same bits
        np.testing.assert_array_equal(jitted(x), first)
    short = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(linear.project(x, kernel) * 1.5), x))
    rows = np.concatenate([short(x[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(short(x), rows, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_gradient_and_vmap(any_size, rows):
    x, kernel = arrays((rows, 24), (24, 36))

    def value(f):
        return jax.grad(lambda x, kernel: jnp.sin(f(x, kernel)).sum(), (0, 1))(x, kernel)

    for mine, plain in zip(value(linear.project), value(jnp.matmul), strict=True):
        np.testing.assert_allclose(mine, plain, atol=1e-4)
    several = np.stack([x, 2 * x])
    np.testing.assert_allclose(
        jax.vmap(linear.project, (0, None))(several, kernel), np.matmul(several, kernel), atol=1e-4
    )


def refuse(*args, **kwargs):
    raise RuntimeError("not this one")


NO_KERNEL = {  # name -> what is in its place
    "an old build": (rustbpe, "skinny_matmul", None, "pip install"),
    "an old processor": (rustbpe, "skinny_matmul", lambda: None, "AVX2"),
    "registering fails": pytest.param(jax.ffi, "register_ffi_target", refuse, "not this one", marks=needs_kernel),
}


@pytest.mark.parametrize("module, name, instead, reason", NO_KERNEL.values(), ids=NO_KERNEL)
def test_without_the_kernel_the_product_is_a_plain_one_and_the_log_says_why_once(
    undecided, monkeypatch, caplog, module, name, instead, reason
):
    if instead is None:
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, instead)
    x, kernel = arrays((8, 256), (256, 1024))
    with caplog.at_level(logging.INFO, "nanochat_jax.hardware.cpu_kernels"):
        for _ in range(2):
            assert not custom_calls(lambda x, kernel: linear.project(x, kernel), x, kernel)
            np.testing.assert_array_equal(project(x, kernel), jax.jit(jnp.matmul)(x, kernel))
    (message,) = [
        record.getMessage() for record in caplog.records if record.name == "nanochat_jax.hardware.cpu_kernels"
    ]
    assert "skinny_matmul" in message and reason in message


REFUSED = """
import ctypes, logging
import jax, jax.numpy as jnp
import rustbpe
from nanochat_jax.model import linear

@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
def handler(frame):  # answers XLA's question for the version of its interface with 0.99
    extension = ctypes.c_size_t.from_address(frame + 8).value
    metadata = ctypes.c_size_t.from_address(extension + 24).value
    (ctypes.c_int * 2).from_address(metadata + 24)[:] = 0, 99

logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
rustbpe.skinny_matmul = lambda: jax.ffi.pycapsule(handler)
jax.eval_shape(linear.project, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(8, 256), (256, 1024)]))
print(jax.jit(linear.project)(jnp.ones((8, 256)), jnp.ones((256, 1024))).sum())
"""


def test_without_the_kernel_xla_has_another_interface():
    # in a process of its own: until its backend has started, XLA takes any handler and complains only later
    done = children.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 8 * 256 * 1024
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("nanochat_jax.hardware.cpu_kernels")]
    assert "does not take it" in message and "0.99" in message


def version(frame_size=168, api_size=192, extension_size=32, metadata_size=36) -> tuple[int, int]:
    """The version of XLA's interface the handler reports when asked as XLA asks it, with structures of these sizes."""
    api = (ctypes.c_uint64 * 24)(api_size)
    metadata = (ctypes.c_uint64 * 6)(metadata_size, 24)
    extension = (ctypes.c_uint64 * 4)(extension_size, 1, 0, ctypes.addressof(metadata))
    frame = (ctypes.c_uint64 * 22)(frame_size, ctypes.addressof(extension), ctypes.addressof(api), 0, 3)
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    handler = get(rustbpe.skinny_matmul(), b"xla._CUSTOM_CALL_TARGET")
    assert ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(handler)(ctypes.addressof(frame)) is None
    return metadata[3] & 0xFFFFFFFF, metadata[3] >> 32


@needs_kernel
def test_the_handler_does_not_introduce_itself_to_an_xla_with_shorter_structures():
    assert version() != (0, 0)
    assert version(frame_size=80) == version(api_size=144) == (0, 0)
    assert version(extension_size=24) == version(metadata_size=32) == (0, 0)


# The declarations that rustbpe/src/cpu_kernels/xla.rs repeats, as far as it uses them.
HEAD = "size_t struct_size; XLA_FFI_Extension_Base* extension_start;"
DECLARED = {
    "Api_Version": f"{HEAD} int major_version; int minor_version;",
    "Error_Create_Args": f"{HEAD} const char* message; XLA_FFI_Error_Code errc;",
    "Error_Destroy_Args": f"{HEAD} XLA_FFI_Error* error;",
    "Buffer": f"{HEAD} XLA_FFI_DataType dtype; void* data; int64_t rank; int64_t* dims;",
    "Args": f"{HEAD} int64_t size; XLA_FFI_ArgType* types; void** args;",
    "Rets": f"{HEAD} int64_t size; XLA_FFI_RetType* types; void** rets;",
    "CallFrame": f"{HEAD} const XLA_FFI_Api* api; XLA_FFI_ExecutionContext* ctx; XLA_FFI_ExecutionStage stage; "
    "XLA_FFI_Args args; XLA_FFI_Rets rets;",
    "ThreadPool_Schedule_Args": f"{HEAD} XLA_FFI_ExecutionContext* ctx; XLA_FFI_Task* task; void* data;",
    "ThreadPool_NumThreads_Args": f"{HEAD} XLA_FFI_ExecutionContext* ctx; int64_t* num_threads;",
    "Extension_Base": "size_t struct_size; XLA_FFI_Extension_Type type; struct XLA_FFI_Extension_Base* next;",
    "Metadata_Extension": "XLA_FFI_Extension_Base extension_base; XLA_FFI_Metadata* metadata;",
    "Metadata": "size_t struct_size; XLA_FFI_Api_Version api_version; XLA_FFI_Handler_Traits traits;",
    "Api": f"{HEAD} XLA_FFI_Api_Version api_version; const XLA_FFI_InternalApi* internal_api; "
    + " ".join(
        f"_XLA_FFI_API_STRUCT_FIELD(XLA_FFI_{name});"
        for name in """Error_Create Error_GetMessage Error_Destroy Handler_Register Stream_Get Type_Register
        ExecutionContext_Get State_Set State_Get DeviceMemory_Allocate DeviceMemory_Free ThreadPool_Schedule
        ThreadPool_NumThreads""".split()
    ),
}
CONSTANTS = {
    "Extension_Metadata": 1,
    "ExecutionStage_EXECUTE": 3,
    "DataType_S32": 4,
    "DataType_F32": 11,
    "Error_Code_INVALID_ARGUMENT": 3,
}


@needs_kernel
def test_the_header_of_the_installed_xla_says_what_we_declare():
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    if not header.exists():
        pytest.skip("this jaxlib comes without its header")
    text = " ".join(re.sub(r"//.*", "", header.read_text()).split())
    major, minor = (int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", text)[0]) for part in ("MAJOR", "MINOR"))
    assert version() == (major, minor), "compare cpu_kernels/xla.rs with the header, then raise VERSION there"
    for name, fields in DECLARED.items():
        assert f"struct XLA_FFI_{name} {{ {fields}" in text, name
    for name, value in CONSTANTS.items():
        assert f"XLA_FFI_{name} = {value}," in text, name
