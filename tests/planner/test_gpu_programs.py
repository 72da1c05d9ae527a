"""What the programs do on a GPU, read from programs compiled for one that is not there."""

import re
from importlib.util import find_spec

import pytest

from nanochat_jax.planner import hlo
from tests.gpu_programs import ROWS, SLOTS, T, compile_for

PALLAS = "__gpu$xla.gpu.triton"
pytestmark = pytest.mark.gpu_compile
if find_spec("jax_cuda12_plugin") is None:
    pytest.skip("needs the CUDA plugin", allow_module_level=True)

DECODING = {"decode": 2, "decode_deeper": 4, "decode_modern": 4}  # and how many layers


@pytest.fixture(scope="module")
def training():
    """The modern recipe on 8 H100s, with 255 tokens a row."""
    return compile_for("h100", 8, ["train_step", "train_step_fsdp", "train_step_float8"])


@pytest.fixture(scope="module")
def small():
    return compile_for("h100", 1, ["gradients", "norms", "norms_unfused"])


@pytest.fixture(scope="module")
def decoding():
    return compile_for("h100", 1, list(DECODING), decodes=True)


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


@pytest.mark.parametrize("name", ["train_step", "train_step_fsdp", "train_step_float8"])
def test_norms_are_kernels_of_our_own(training, name):
    """In each of two layers two norms beside the stream and two after rotary embedding, forward and backward."""
    assert len(calls(training[name].text, PALLAS)) == 2 * 4 * 2


def test_fused_norms_are_one_pass_forward_and_one_backward(small):
    fused, plain = (hlo.count(small[name].text) for name in ("norms", "norms_unfused"))
    assert len(calls(small["norms"].text, PALLAS)) == 3 * 2
    # arrays of an activation's size, read and written: beside the stream 2 and 4, mixing 4 and 8, rotary 2 and 3
    array = ROWS * (T + 1) * 512 * 2
    assert 23 * array <= fused.bytes < 23.5 * array < plain.bytes
    assert len(fused.kernels) < len(plain.kernels)


def test_logits_are_written_in_bfloat16(small):
    """Of the loss's arrays (tokens, vocabulary) there are two, the raw logits and their gradient."""
    types = re.findall(r"= (.+?) (?:fusion|custom-call)\(", small["gradients"].text)
    logits = [dtype for t in types for dtype in re.findall(rf"(\w+)\[{ROWS * (T + 1)},4096\]", t)]
    assert logits == ["bf16", "bf16"], logits


def test_float8_products_are_float8(training):
    """Of two layers with four products each (XLA makes one of queries, keys and values): forward, the gradient of the
    input, the gradient of the kernel. Where XLA does not see them, nothing is said and all are bfloat16."""
    assert len(calls(training["train_step_float8"].text, "__cublas$lt$matmul$f8")) == 2 * 4 * 3
    assert not calls(training["train_step"].text, "__cublas$lt$matmul$f8")


def slot_bytes(layers: int, positions: int = 1024) -> int:
    """Keys and values of `layers` layers: slots, heads, positions, width, bytes."""
    return 2 * layers * SLOTS * 2 * positions * 128 * 2


@pytest.mark.parametrize("name", DECODING)
def test_decoding_copies_no_slots(decoding, name):
    """Nor what is visible of them: temporaries are those of sampling, and no deeper model needs more."""
    program = decoding[name]
    assert program.aliased >= slot_bytes(DECODING[name]), "the storage is not donated"
    assert program.temporary < 8 * 2**20 and abs(program.temporary - decoding["decode"].temporary) < 2**18
    assert not re.search(rf"= bf16\[{SLOTS},2,1024,128\]\S* (copy|transpose)", program.text)


def test_a_layer_and_token_are_few_kernels(decoding):
    kernels = {name: program.kernels for name, program in decoding.items()}
    assert kernels["decode_deeper"] - kernels["decode"] <= 2 * 15
    # a window is two kernels more than cuDNN's one; factors and value embeddings, one and two
    assert kernels["decode_modern"] - kernels["decode_deeper"] <= 4 * 5


def test_attention_of_decoding_is_cudnns_with_lengths_as_data(decoding):
    """One call for each layer without a window, on the storage itself, of which it reads what the lengths say."""
    for name, layers in {**DECODING, "decode_modern": 1}.items():
        found = calls(decoding[name].text, "__cudnn$fmhaSoftmax")
        assert len(found) == layers and all('"mask_type":"PADDING"' in call.replace(" ", "") for call in found)


def test_a_window_is_read_where_it_lies(decoding):
    """Of the three layers with one of 256, two kernels each read keys or values of that many tokens and one, no other
    kernel as much, and nothing of that size is written."""
    kernels = sorted(kernel.bytes for kernel in hlo.count(decoding["decode_modern"].text).kernels)
    window, whole = slot_bytes(1, 257) // 2, slot_bytes(1)
    assert len([n for n in kernels if window < n < 1.1 * window]) == 6
    assert [n for n in kernels if n > 1.2 * window] == [n for n in kernels if n > whole] and kernels[-2] < whole
    assert not re.search(
        r"= bf16\[32,(1,)?2,257,128\]\S* (fusion|copy|gather)\(%(input|get)", decoding["decode_modern"].text
    )


def test_queries_keys_and_values_are_one_product(decoding):
    """Of kernels that lie together: nothing puts them together for every token."""
    text = decoding["decode"].text
    assert not re.search(r"= bf16\[512,1024\]\S* (fusion|concatenate)", text)
    assert len(re.findall(r"= \(bf16\[32,1024\]\S*, .*__cublas", text)) == 2


@pytest.mark.parametrize("name", DECODING)
def test_a_decode_call_is_one_launch(decoding, name):
    """Its loop and the branches of sampling are part of a CUDA graph: the GPU waits for the host at no token."""
    launched = [line for line in decoding[name].launches if re.match(r"\d+:", line)]
    assert len(launched) == 1 and "kCommandBuffer" in launched[0]
    assert any("kWhile" in line for line in decoding[name].launches)
