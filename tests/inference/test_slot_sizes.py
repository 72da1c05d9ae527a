"""Which sizes the decoder's programs have: what a call looks at and copies, and that few programs serve everything."""

from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_jax.inference.model_runner import ModelRunner, largest_copy, slot_length, visible_positions

CAPACITIES = [1, 20, 60, 64, 100, 500, 825, 1000, 1024, 1500, 2032, 2048]


@pytest.mark.parametrize("steps", [4, 16, 32])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_call_sees_every_token_and_copies_three_quarters_of_a_slot_at_most(capacity, steps):
    length = slot_length(capacity, steps)
    assert length % 64 == 0 and length >= capacity + max(steps, 16)
    seen = [visible_positions(n, length) for n in range(length + 1)]
    assert all(n <= v <= length for n, v in enumerate(seen)) and seen[0] == 0
    copied = {v for v in seen if v < length}
    assert largest_copy(length) == max(copied) <= 0.75 * length, "looking at all of a slot copies nothing"


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_chunks_of_prompts_have_few_sizes_and_never_overhang(few, capacity):
    runner: ModelRunner = object.__new__(ModelRunner)
    vars(runner).update(capacity=capacity, _physical=slot_length(capacity, 4), _access="xla" if few else "copied")
    sizes = set()
    for begin in range(capacity):
        for left in {1, 17, 63, 65, 511, 512, 2000, capacity - begin}:
            length, visible = runner._chunk(begin, left)
            assert begin + length <= runner._physical and begin <= visible <= runner._physical
            sizes.add((length, visible))
    assert len(sizes) <= (6 if few else 36)
    rows = {runner._visible_to_rows(n) for n in range(capacity + 1)}
    copies = {runner._visible_to_copy(n) for n in range(1, capacity + 1)}
    if few:  # a program takes a GPU's compiler many seconds
        assert len(rows) == len(copies) == 1


@pytest.mark.parametrize(("slots", "few", "sizes"), [(32, False, [1, 4, 16, 32]), (32, True, [32]), (8, True, [8])])
def test_batch_sizes(slots, few, sizes):
    runner: Any = SimpleNamespace(per_device=slots, _few=few)
    assert ModelRunner.batch_sizes(runner) == sizes
