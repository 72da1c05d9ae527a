"""What the programs do on a GPU, read from programs compiled for one that is not there."""

import re
from importlib.util import find_spec

import pytest

from tests.gpu_programs import SLOTS, compile_for

pytestmark = pytest.mark.gpu_compile
if find_spec("jax_cuda12_plugin") is None:
    pytest.skip("needs the CUDA plugin", allow_module_level=True)


@pytest.fixture(scope="module")
def training():
    """The modern recipe on 8 H100s, with 255 tokens a row."""
    return compile_for("h100", 8, ["train_step", "train_step_fsdp", "train_step_float8"])


@pytest.fixture(scope="module")
def decoding():
    return compile_for("h100", 1, ["decode", "decode_part"], decodes=True)


def calls(text: str, target: str) -> list[str]:
    return re.findall(rf'^.*custom_call_target="{re.escape(target)}".*$', text, re.M)


def test_attention_is_cudnns_for_odd_lengths_too_with_mask_and_window_as_arguments(training):
    text = training["train_step"].text
    for target in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        found = calls(text, target)
        assert len(found) == 2 and all('"mask_type":"CAUSAL"' in call.replace(" ", "") for call in found)
        windows = sorted(int(w) for call in found for w in re.findall(r'"sliding_window_length": ?"?(\d+)', call))
        assert windows == [0, 129], "the second layer sees everything"


@pytest.mark.parametrize("name", ["train_step", "train_step_fsdp"])
def test_gradients_of_embeddings_are_added_in_float32(training, name):
    scatters = re.findall(r"= (\w+)\[([\d,]+)\]\S* scatter\(", training[name].text)
    assert {dtype for dtype, _ in scatters} == {"f32"} and len(scatters) >= 2


def test_large_products_are_cublas(training):
    text = training["train_step"].text
    assert "__triton_gemm" not in text and len(calls(text, "__cublas$gemm")) + text.count("__cublas$lt$matmul") > 20


def test_float8_products_are_float8(training):
    """Of two layers with four products each (XLA makes one of queries, keys and values): forward, the gradient of the
    input, the gradient of the kernel. Where XLA does not see them, nothing is said and all are bfloat16."""
    assert len(calls(training["train_step_float8"].text, "__cublas$lt$matmul$f8")) == 2 * 4 * 3
    assert not calls(training["train_step"].text, "__cublas$lt$matmul$f8")


def test_decoding_whole_slots_copies_nothing(decoding):
    full, part = decoding["decode"], decoding["decode_part"]
    storage = 2 * 2 * SLOTS * 2 * 1024 * 128 * 2  # keys and values, layers, slots, heads, positions, width, bytes
    assert full.aliased >= storage and part.aliased >= storage, "the storage is not donated"
    assert full.temporary < storage / 2 < part.temporary < storage
