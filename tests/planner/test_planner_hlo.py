"""Counting in HLO text: against small modules written by hand, and against programs compiled for the CPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanochat_jax.planner import hlo

# A loop of 3 turns with a reduction inside, a gather and a scatter of two arrays outside, a matrix product in a fusion,
# a slice, an update in place, attention.
MODULE = """
HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[16]{0} get-tuple-element(%p), index=1
  %r = f32[16]{0} all-reduce(%v), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  ROOT %t = (s32[], /*index=1*/f32[16]{0}) tuple(%i, %r)
}

%condition (p.1: (s32[], f32[16])) -> pred[] {
  %p.1 = (s32[], f32[16]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%product (x: bf16[4,32], y: bf16[32,8]) -> f32[4,8] {
  %x = bf16[4,32]{1,0} parameter(0)
  %y = bf16[32,8]{1,0} parameter(1)
  ROOT %dot = f32[4,8]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%slicing (big: f32[100,10], at: s32[]) -> f32[1,10] {
  %big = f32[100,10]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %flat = f32[100,10]{1,0} bitcast(%big)
  ROOT %piece = f32[1,10]{1,0} dynamic-slice(%flat, %at, %at), dynamic_slice_sizes={1,10}
}

%updating (all: f32[100,10], new: f32[1,10], at.1: s32[]) -> f32[100,10] {
  %all = f32[100,10]{1,0} parameter(0)
  %new = f32[1,10]{1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  ROOT %put = f32[100,10]{1,0} dynamic-update-slice(%all, %new, %at.1, %at.1)
}

ENTRY %main (q: bf16[2,64,4,16], x.1: bf16[4,32], y.1: bf16[32,8], big.1: f32[100,10], n: s32[]) -> f32[4,8] {
  %q = bf16[2,64,4,16]{3,2,1,0} parameter(0)
  %x.1 = bf16[4,32]{1,0} parameter(1)
  %y.1 = bf16[32,8]{1,0} parameter(2)
  %big.1 = f32[100,10]{1,0} parameter(3)
  %n = s32[] parameter(4)
  %init = (s32[], f32[16]{0}) tuple(%n, %big.1)
  %loop = (s32[], f32[16]{0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[4,8]{1,0} fusion(%x.1, %y.1), kind=kCustom, calls=%product, metadata={op_name="jit(step)/dot"}
  %s = f32[1,10]{1,0} fusion(%big.1, %n), kind=kLoop, calls=%slicing
  %u = f32[100,10]{1,0} fusion(%big.1, %s, %n), kind=kLoop, calls=%updating
  %g = ((f32[4,8]{1,0}), (f32[32,8]{1,0})) all-gather-start(%f), replica_groups=[1,8]<=[8], dimensions={0}
  %gd = f32[32,8]{1,0} all-gather-done(%g)
  %rs = ((f32[32,8]{1,0}, f32[32,8]{1,0}), (f32[4,8]{1,0}, f32[4,8]{1,0})) reduce-scatter-start(%gd, %gd), replica_groups=mesh['a'=1,'b'=8] {'b'}, metadata={op_name="jit(step)/reduce_scatter"}
  %rd = (f32[4,8]{1,0}, f32[4,8]{1,0}) reduce-scatter-done(%rs)
  %fw = (bf16[2,4,64,16]{3,1,2,0}, u8[1000]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "64", "64"]}, "mask_type": "CAUSAL"}}
  %bw = (bf16[2,4,64,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "64", "64"]}, "mask_type": "CAUSAL"}}
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%rd), index=0
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def counts():
    return hlo.count(MODULE)


def test_collectives(counts):
    found = {c.kind: c for c in counts.collectives}
    assert len(counts.collectives) == 3
    reduce, gather, scatter = found["all-reduce"], found["all-gather"], found["reduce-scatter"]
    assert (reduce.bytes, reduce.group, reduce.times, reduce.in_loop) == (64, 4, 3, True)
    assert (gather.bytes, gather.group, gather.times, gather.in_loop) == (32 * 8 * 4, 8, 1, False)
    assert (scatter.bytes, scatter.group, scatter.tensors) == (2 * 32 * 8 * 4, 8, 2)
    assert scatter.source == "jit(step)/reduce_scatter"
    # ring algorithm: an all-reduce sends its payload almost twice, the other two almost once
    assert reduce.link_bytes == 2 * 3 / 4 * 64 and gather.link_bytes == 7 / 8 * 1024
    assert counts.link_bytes == 3 * 96 + 7 / 8 * 1024 + 7 / 8 * 2048


def test_flops_and_attention(counts):
    forward = 2 * 2 * (2 * 4 * 64 * 64) * 16 / 2  # two products over half of the scores
    assert counts.flops == 2 * 4 * 8 * 32 + forward + 2.5 * forward
    assert (counts.attention_forward, counts.attention_backward, counts.unknown_loops) == (1, 1, 0)


def test_bytes_count_slices_and_not_what_they_are_cut_from(counts):
    product, piece, put, *attention = [k.bytes for k in counts.kernels]
    assert product == 4 * 32 * 2 + 32 * 8 * 2 + 4 * 8 * 4
    assert piece == 40 + 4 + 40
    assert put == 40 + 4 + 40  # the new piece and the index are read, the piece is written
    assert attention == [4 * 2 * 64 * 4 * 16 * 2] * 2  # three arrays read, one written; a workspace is neither


def test_kernel_seconds_take_the_slower_rate_of_each(counts):
    kernels = [hlo.Kernel("product", 10.0, 1, 2), hlo.Kernel("other", 1.0, 10, 1)]
    assert hlo.Counts(kernels=kernels).kernel_seconds(1.0, 1.0) == 2 * 10 + 10
    assert hlo.Counts(kernels=kernels).other_bytes == 10
    half = {**hlo.PEAK, "product": 0.5, "memory": 0.25}
    assert hlo.Counts(kernels=kernels).kernel_seconds(1.0, 1.0, half) == 2 * 20 + 40


def test_shape_bytes():
    assert hlo.shape_bytes("(f32[2,3]{1,0}, bf16[4], /*index=2*/s32[])") == 24 + 8 + 4
    assert hlo.shape_bytes("pred[7]") == 7 and hlo.shape_bytes("token[]") == 0


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.count("nothing here")


def test_a_real_program(monkeypatch):
    """On simulated devices: one gather of known size, and the products of a loop of five turns."""
    n = len(jax.devices())
    mesh = jax.make_mesh((n,), ("d",), (AxisType.Auto,))
    sharded, unsharded = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("d",), ()))

    def run(x, w):
        x = jax.lax.with_sharding_constraint(x, unsharded)
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)

    x, w = jax.ShapeDtypeStruct((8 * n, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled = jax.jit(run, in_shardings=(sharded, unsharded), out_shardings=unsharded).lower(x, w).compile()
    counted = hlo.count(compiled.as_text() or "")
    gathers = [(c.bytes, c.group, c.in_loop) for c in counted.collectives if c.kind == "all-gather"]
    assert gathers == [(8 * n * 64 * 4, n, False)]
    assert counted.flops == 5 * 2 * 8 * n * 64 * 64
