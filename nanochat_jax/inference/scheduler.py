"""Which request has which slot of the engine, and what the free slots still remember. No JAX here.

A slot that is set free keeps its keys and values until another request needs it: the next turn of a conversation finds
the earlier ones there, samples of one prompt and prompts with a common prefix share it. What is shared is found by
comparing token ids, so no caller has to ask for it.
"""

from dataclasses import dataclass

import numpy as np

from nanochat_jax.inference.request import Request

# A shorter prefix is not worth a copy, nor a conversation's slot: it is prefilled in one smallest chunk anyway.
MIN_SHARED_PREFIX = 16


@dataclass(frozen=True)
class SlotAssignment:
    """Where a request goes: `slot`. The first `shared` tokens of its prompt are in the slot `source`, now or soon.

    source equal to slot: nothing to copy. prefix_donor: the request that is still filling the source, to be waited for.
    """

    slot: int
    source: int
    shared: int
    prefix_donor: Request | None = None


class Scheduler:
    """`slots` slots over `devices` devices, the first part of them on the first device, and so on."""

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
        """The requests that have slots, finished ones not yet released among them."""
        return [r for r in self.requests if r is not None]

    def held(self, slot: int) -> int:
        """How many tokens a free slot holds."""
        return len(self._held[slot])

    def forget(self) -> None:
        """Drops what free slots hold: the parameters it was computed with have changed."""
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

    def assign(self, request: Request) -> SlotAssignment | None:
        """Gives the request the free slot that saves most work; None if none is free."""
        free = [slot for slot, occupant in enumerate(self.requests) if occupant is None]
        if not free:
            return None
        assignment = self._best(request, free)
        self.requests[assignment.slot] = request
        self._held[assignment.slot] = _EMPTY
        return assignment

    def _best(self, request: Request, free: list[int]) -> SlotAssignment:
        prompt = request.prompt
        wanted = np.array(prompt[:-1], np.int64)  # the last token is fed to the decode loop, not prefilled
        load = [0] * (len(self) // self.per_device)
        for slot, occupant in enumerate(self.requests):
            load[slot // self.per_device] += occupant is not None

        # 1. Without anything shared: the emptiest device, then slots that hold nothing, then the one freed longest ago.
        fresh = min(free, key=lambda s: (load[s // self.per_device], self.held(s) > 0, self._freed[s], s))
        best = SlotAssignment(fresh, fresh, 0)
        if request.params.prompt_logprobs is not None:  # which are not in the cache
            return best

        # 2. A free slot that holds the longest common prefix: used in place, or copied from where more than twice as
        #    much is held, which is another conversation's.
        shared = [_common_prefix(wanted, held) for held in self._held]
        in_place = max(free, key=lambda s: (shared[s], -s))
        if shared[in_place] >= MIN_SHARED_PREFIX:
            slot: int | None = in_place
            if 2 * shared[in_place] < self.held(in_place):
                slot = self._beside(in_place, free)
            best = SlotAssignment(in_place if slot is None else slot, in_place, shared[in_place])

        # 3. A running request whose prompt shares a longer one: copied when it has been prefilled.
        prefix = list(prompt[:MIN_SHARED_PREFIX])
        for slot, occupant in enumerate(self.requests):
            if occupant is None or occupant.prompt[:MIN_SHARED_PREFIX] != prefix:
                continue
            common = _common_prefix(wanted, np.array(occupant.prompt[:-1], np.int64))
            if common >= MIN_SHARED_PREFIX and common > best.shared:
                if (target := self._beside(slot, free)) is not None:
                    best = SlotAssignment(target, slot, common, occupant)
        return best

    def _beside(self, source: int, free: list[int]) -> int | None:
        """The free slot on the device of `source`, other than it, whose content is missed least."""
        device = source // self.per_device
        near = [s for s in free if s // self.per_device == device and s != source]
        return min(near, key=lambda s: (self.held(s) > 0, self._freed[s], s), default=None)


_EMPTY = np.zeros(0, np.int64)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix; 0 where it is below `MIN_SHARED_PREFIX` (called a hundred times a request)."""
    n = MIN_SHARED_PREFIX
    if len(b) < n or a[:n].tobytes() != b[:n].tobytes():
        return 0
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
