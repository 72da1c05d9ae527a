"""Which request sits in which slot of the engine, and what the free slots still remember. No JAX here.

A slot that is set free keeps its keys and values until somebody needs it: a conversation that goes on finds its earlier
turns there, samples of one prompt and prompts with one beginning share it. What is shared is found by comparing token
ids, so nobody has to ask for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat_jax.inference.request import Request

# Fewer tokens are not worth a copy, nor a conversation's slot: they are prefilled in one smallest chunk anyway.
WORTH_SHARING = 16


@dataclass(frozen=True)
class Seat:
    """Where a request goes: `slot`; the first `shared` tokens of its prompt are in the slot `source`, now or soon.

    source equal to slot: nothing to copy. leader: the request that is still filling the source, to be waited for.
    """

    slot: int
    source: int
    shared: int
    leader: Request | None = None


class SlotTable:
    """`slots` slots dealt to `devices` devices, the first part of them to the first device, and so on."""

    def __init__(self, slots: int, devices: int = 1):
        self.requests: list[Request | None] = [None] * slots
        self.per_device = slots // devices
        self._held: list[np.ndarray] = [_EMPTY] * slots  # tokens whose keys and values a free slot holds
        self._freed = [0] * slots  # when: the least recently freed slot is taken first
        self._clock = 0

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def busy(self) -> list[Request]:
        """The requests that sit in slots, finished ones not yet removed among them."""
        return [r for r in self.requests if r is not None]

    def held(self, slot: int) -> int:
        """How many tokens a free slot holds."""
        return len(self._held[slot])

    def forget(self) -> None:
        """What free slots hold is worth nothing any more: the parameters changed."""
        self.release()
        self._held = [_EMPTY] * len(self)

    def release(self) -> None:
        """Sets the slots of finished requests free; what was computed in them stays known."""
        for slot, request in enumerate(self.requests):
            if request is not None and request.finished is not None:
                self.requests[slot] = None
                self._held[slot] = np.array(request.cached_tokens(), np.int64)
                self._clock += 1
                self._freed[slot] = self._clock

    def seat(self, request: Request) -> Seat | None:
        """A free slot for the request, the one that saves most work, taken now; None if there is none."""
        free = [slot for slot, occupant in enumerate(self.requests) if occupant is None]
        if not free:
            return None
        seat = self._best(request.prompt, free)
        self.requests[seat.slot] = request
        self._held[seat.slot] = _EMPTY
        return seat

    def _best(self, prompt: Sequence[int], free: list[int]) -> Seat:
        wanted = np.array(prompt[:-1], np.int64)  # the last token is fed to the decode loop, not prefilled
        load = [0] * (len(self) // self.per_device)
        for slot, occupant in enumerate(self.requests):
            load[slot // self.per_device] += occupant is not None
        # emptiest device, then slots that remember nothing, then the one forgotten longest
        fresh = min(free, key=lambda s: (load[s // self.per_device], self.held(s) > 0, self._freed[s], s))
        shared = [_common(wanted, held) for held in self._held]
        in_place = max(free, key=lambda s: (shared[s], -s))
        best = Seat(in_place, in_place, shared[in_place])
        if best.shared < WORTH_SHARING:
            best = Seat(fresh, fresh, 0)
        elif 2 * best.shared < self.held(in_place):  # another conversation with the same beginning: leave it there
            target = self._beside(in_place, free)
            best = Seat(in_place if target is None else target, in_place, best.shared)
        beginning = list(prompt[:WORTH_SHARING])
        for slot, occupant in enumerate(self.requests):
            if occupant is None or occupant.prompt[:WORTH_SHARING] != beginning:
                continue
            common = _common(wanted, np.array(occupant.prompt[:-1], np.int64))
            if common >= WORTH_SHARING and common > best.shared and (target := self._beside(slot, free)) is not None:
                best = Seat(target, slot, common, occupant)
        return best

    def _beside(self, source: int, free: list[int]) -> int | None:
        """The free slot on the device of `source`, other than it, whose content is missed least."""
        device = source // self.per_device
        near = [s for s in free if s // self.per_device == device and s != source]
        return min(near, key=lambda s: (self.held(s) > 0, self._freed[s], s), default=None)


_EMPTY = np.zeros(0, np.int64)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning; 0 where it is not `WORTH_SHARING` (found out a hundred times a request)."""
    if len(b) < WORTH_SHARING or a[:WORTH_SHARING].tobytes() != b[:WORTH_SHARING].tobytes():
        return 0
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
