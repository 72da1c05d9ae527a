"""Scores given tokens: log-likelihoods of spans and logits of letters, for any number of prompts of any length.

How a call of `spans` or `choices` goes:

1. each item becomes a `_Query`: its input tokens and the positions whose predictions are wanted;
2. `_share` groups neighbours with a common prefix (the options of one multiple-choice item behind ten shots): the
   prefix is computed once, its keys and values are the cache each suffix is run against;
3. `_plan` sorts groups by length into batches of a few fixed shapes, so nothing is recompiled after warm-up;
4. `_dispatch` packs a batch and starts its forward pass to hidden states; those of the scored positions are gathered,
   and the unembedding, the most expensive part of a small model, runs on them alone;
5. `_fetch` waits for a batch while the next one is already on the devices, and the results go to their items.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.model import gpt
from nanochat_jax.model.gpt import GPTConfig, Params
from nanochat_jax.model.kv_cache import KVCache
from nanochat_jax.parallel import sharding
from nanochat_jax.utils.errors import InputError

Ids = Sequence[int] | np.ndarray
Progress = Callable[[int, int], None]

MAX_SUFFIXES = 16  # suffixes of one shared prefix; an item with more options is run as several
MIN_SHARED = 128  # tokens that sharing must save, besides a quarter of the prompt, to be worth a program of its own


def row_length(n: int) -> int:
    """The padded length of a row of n tokens: 64, 128, then two sizes an octave: 256, 384, 512, 768, 1024 ..."""
    octave = max(64, 1 << (n - 1).bit_length())  # the power of two at or above
    return octave * 3 // 4 if octave > 256 and n <= octave * 3 // 4 else octave


def suffix_length(n: int) -> int:
    """The padded length of suffixes: 0, 16, 64, 256 ... They are short compared with their prefix."""
    return 0 if n == 0 else 16 << 2 * max(0, -(-((n - 1).bit_length() - 4) // 2))


@dataclass
class ScorerStats:
    """What a scorer has done so far: prompts truncated, tokens of all prompts, tokens run (less where prefixes are
    shared)."""

    cropped: int = 0
    tokens_given: int = 0
    tokens_run: int = 0


class Scorer:
    """Scores token ids with one model. Set `params` to score with other parameters of the same configuration.

    With a mesh, the rows of every batch are sharded over its devices; `params` must then be replicated or on the host.
    `max_tokens_per_batch` is per device and bounds memory. Prompts longer than `max_length` (default and at most the
    rotary range of 10 x sequence_len) lose their first tokens, as in the reference, and are counted in `stats`.
    """

    def __init__(
        self,
        config: GPTConfig,
        params: Params,
        *,
        mesh: Mesh | None = None,
        max_tokens_per_batch: int | None = None,
        max_length: int | None = None,
    ):
        cpu = jax.default_backend() == "cpu"
        chunk = 128 if cpu else 1024
        wanted = max_tokens_per_batch or (4096 if cpu else 32768)
        if wanted < 1:
            raise InputError(f"max_tokens_per_batch must be positive, got {max_tokens_per_batch}")
        self.config, self.params, self.stats = config, params, ScorerStats()
        self.max_length = min(max_length or 10 * config.sequence_len, 10 * config.sequence_len)
        self._budget = -(-wanted // chunk) * chunk
        self._devices = 1 if mesh is None else mesh.size
        self._programs = _programs(config, mesh, chunk)

    def spans(
        self, items: Sequence[tuple[Ids, int, int]], progress: Progress | None = None
    ) -> list[tuple[float, bool, np.ndarray]]:
        """For each (ids, start, end): how likely ids[start:end] is, given all that comes before.

        Returns (mean nll in nats, whether every token of the span is the model's most likely one, the nll of each token
        as float32); an empty span gives (nan, True, empty). Raises ValueError unless 1 <= start <= end <= len(ids):
        the first token has nothing before it. `progress(done, total)` counts computed token positions.
        """
        queries, targets, at = [], [], 0
        for ids, start, end in items:
            if not 1 <= start <= end <= len(ids):
                raise ValueError(f"a span needs 1 <= start <= end <= {len(ids)} tokens, got {start} and {end}")
            ids = np.asarray(ids[:end], np.int32)
            if cut := max(0, end - self.max_length):
                self.stats.cropped += 1
                ids, start, end = ids[cut:], max(1, start - cut), end - cut
            queries.append(_Query(ids[: end - 1], start - 1, end - 1, at))
            targets.append(ids[start:end])
            at += end - start
        flat = np.concatenate(targets) if targets else np.zeros(0, np.int32)
        nll, greedy = np.zeros(at, np.float32), np.zeros(at, bool)
        for place, (batch_nll, batch_greedy) in self._run(queries, self._programs.nll, flat, progress):
            nll[place], greedy[place] = batch_nll[:, 0], batch_greedy[:, 0]
        own = [slice(q.out, q.out + q.last - q.first) for q in queries]
        return [(float(nll[s].mean()) if s.stop > s.start else math.nan, bool(greedy[s].all()), nll[s]) for s in own]

    def choices(
        self, prompts: Sequence[Ids], letters: Sequence[Sequence[int]], progress: Progress | None = None
    ) -> list[np.ndarray]:
        """The softcapped float32 logits of each prompt's own letters (token ids) as its next token.

        Raises ValueError for an empty prompt or different numbers of prompts and lists of letters.
        """
        if len(prompts) != len(letters):
            raise ValueError(f"{len(prompts)} prompts need as many lists of letters, got {len(letters)}")
        queries = []
        for i, ids in enumerate(prompts):
            if not len(ids):
                raise ValueError(f"prompt {i} is empty: nothing comes before the letter")
            self.stats.cropped += len(ids) > self.max_length
            ids = np.asarray(ids[-self.max_length :], np.int32)
            queries.append(_Query(ids, len(ids) - 1, len(ids), i))
        width = max([4, *(1 << (len(row) - 1).bit_length() for row in letters if len(row))])
        table, out = np.zeros((len(letters), width), np.int32), np.zeros((len(letters), width), np.float32)
        for row, own in zip(table, letters, strict=True):
            row[: len(own)] = own
        for place, logits in self._run(queries, self._programs.letters, table, progress):
            out[place] = logits
        return [row[: len(own)] for row, own in zip(out, letters, strict=True)]

    def compiled_programs(self) -> int:
        """How many programs have been compiled for this configuration and mesh, by all scorers of this process."""
        return sum(program._cache_size() for program in self._programs)

    def _run(self, queries: "list[_Query]", head, wanted: np.ndarray, progress: Progress | None) -> Iterator[tuple]:
        """Yields (outputs, results) where results[i] is what `head` found for wanted[outputs[i]]."""
        plan = list(self._plan(_share([q for q in queries if q.last > q.first])))
        self.stats.tokens_given += sum(len(q.ids) for q in queries)
        total, done = sum(shape.slots(groups) for shape, groups in plan) * self._devices, 0
        pending: deque = deque()
        for shape, groups in plan:
            # the host packs the next batch while the devices work on this one
            pending.append(self._dispatch(shape, groups, head, wanted))
            done += shape.slots(groups) * self._devices
            while len(pending) > 1:
                yield from _fetch(*pending.popleft())
            if progress is not None:
                progress(done, total)
        while pending:
            yield from _fetch(*pending.popleft())

    def _plan(self, groups: "list[_Group]") -> "Iterator[tuple[_Shape, list[_Group]]]":
        """Batches of at most `shape.rows` groups a device, longest first, so that a batch's rows are about as long."""
        by_suffix: dict[int, list[_Group]] = {}
        for group in groups:
            longest = max(map(len, group.suffixes), default=0)
            by_suffix.setdefault(suffix_length(longest), []).append(group)
        rest: list[_Group] = []
        for suffix in sorted(by_suffix):
            rest = sorted([*rest, *by_suffix[suffix]], key=lambda g: -len(g.prefix))
            while rest:
                shape = self._shape(len(rest[0].prefix), suffix)
                batch = rest[: shape.rows * self._devices]
                if suffix and len(batch) < shape.rows * self._devices and suffix != max(by_suffix):
                    break  # too few for a batch of their own: they join those with the next longer suffixes
                rest = rest[len(batch) :]
                yield shape, batch

    def _shape(self, prefix: int, suffix: int) -> "_Shape":
        prefix = min(row_length(prefix), 10 * self.config.sequence_len)
        rows = max(1, self._budget // prefix)
        if suffix:  # the cached pass holds all scores of the prefix: at most 1 GB of them
            rows = max(1, min(rows, (1 << 28) // (self.config.n_head * prefix * prefix)))
        return _Shape(rows, prefix, suffix)

    def _dispatch(self, shape: "_Shape", groups: "list[_Group]", head, wanted: np.ndarray) -> tuple:
        """Starts one batch; returns what `_fetch` needs. Device d gets groups d, d + n, ..."""
        n = self._devices
        R, P, S = shape
        # 1. tokens, padded to the batch's shape, and where in the flat hidden states each wanted position lies:
        #    first the prefixes (R * P), then the suffixes (MAX_SUFFIXES * R * S)
        ids = np.zeros((n * R, P), np.int32)
        lengths = np.ones((n * R, 1), np.int32)
        suffixes = np.zeros((MAX_SUFFIXES, n * R, S), np.int32)
        index: list[list[np.ndarray]] = [[] for _ in range(n)]
        outputs: list[list[np.ndarray]] = [[] for _ in range(n)]
        for i, group in enumerate(groups):
            device, row = i % n, i // n
            length = len(group.prefix)
            ids[device * R + row, :length] = group.prefix
            lengths[device * R + row] = length
            for m, suffix in enumerate(group.suffixes):
                suffixes[m, device * R + row, : len(suffix)] = suffix
            for query, m in group.members:
                position = np.arange(query.first, query.last)
                in_suffix = R * P + (m * R + row) * S + position - length
                index[device].append(np.where(position < length, row * P + position, in_suffix))
                outputs[device].append(query.out + position - query.first)
            self.stats.tokens_run += length + sum(map(len, group.suffixes))
        # 2. the wanted positions of each device, padded to a multiple of the budget
        found = [np.concatenate(p) if p else np.zeros(0, np.int64) for p in outputs]
        counts = np.array([[len(p)] for p in found], np.int32)
        padded = -(-max(1, counts.max()) // self._budget) * self._budget
        gather = np.zeros((n, padded), np.int32)
        asked = np.zeros((n, padded, *wanted.shape[1:]), np.int32)
        for device, (place, own) in enumerate(zip(found, index, strict=True)):
            if own:
                gather[device, : len(place)] = np.concatenate(own)
                asked[device, : len(place)] = wanted[place]
        # 3. hidden states of the wanted positions, then the head on them; neither call waits for the devices
        if S:
            most = np.int32(max(len(g.suffixes) for g in groups))
            hidden = self._programs.shared(self.params, ids, lengths, suffixes, most, gather)
        else:
            hidden = self._programs.plain(self.params, ids, gather)
        return found, head(self.params, hidden, asked.reshape(n * padded, -1), counts)


def _fetch(outputs: list[np.ndarray], results: Any) -> Iterator[tuple]:
    """Waits for one batch: (outputs, results there), device by device."""
    results = jax.tree.map(lambda x: np.asarray(x).reshape(len(outputs), -1, *x.shape[1:]), results)
    for device, place in enumerate(outputs):
        yield place, jax.tree.map(lambda x, d=device, p=place: x[d, : len(p)], results)


# ---------------------------------------------------------------------------------------------------------------------
# what is run, in which shapes


class _Query(NamedTuple):
    """Input tokens, of which the predictions after positions first .. last - 1 are wanted, at `out` of the results."""

    ids: np.ndarray
    first: int
    last: int
    out: int


class _Shape(NamedTuple):
    """A batch of one device: `rows` rows of `prefix` tokens, each with suffixes of `suffix` tokens (0: none)."""

    rows: int
    prefix: int
    suffix: int

    def slots(self, groups: "list[_Group]") -> int:
        return self.rows * (self.prefix + self.suffix * max(len(g.suffixes) for g in groups))


@dataclass
class _Group:
    """Queries with the same prefix. A member is (query, index of its suffix; any if it has none)."""

    prefix: np.ndarray
    suffixes: list[np.ndarray] = field(default_factory=list)
    members: list[tuple[_Query, int]] = field(default_factory=list)


def _share(queries: list[_Query]) -> list[_Group]:
    """Groups neighbours where running their common tokens once saves enough."""
    groups: list[tuple[int, list[_Query]]] = []
    for query in queries:
        if groups:
            shared, members = groups[-1]
            common = _common(members[0].ids[:shared], query.ids)
            # Tokens saved: those now run once for both, less those that the earlier members no longer share.
            saved = shared - len(members) * (shared - common)
            alike = common == shared == len(query.ids)
            enough = saved >= max(MIN_SHARED, len(query.ids) // 4)
            if (alike or enough) and len(members) < MAX_SUFFIXES:
                members.append(query)
                groups[-1] = (common, members)
                continue
        groups.append((len(query.ids), [query]))
    out = []
    for shared, members in groups:
        group, known = _Group(members[0].ids[:shared]), {}
        for query in members:
            suffix = query.ids[shared:]
            if len(suffix) and suffix.tobytes() not in known:
                known[suffix.tobytes()] = len(group.suffixes)
                group.suffixes.append(suffix)
            group.members.append((query, known.get(suffix.tobytes(), 0)))
        out.append(group)
    return out


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


class _Programs(NamedTuple):
    plain: Any
    shared: Any
    nll: Any
    letters: Any


@functools.lru_cache(maxsize=8)
def _programs(config: GPTConfig, mesh: Mesh | None, chunk: int) -> _Programs:
    """The four jitted functions; every array's first axis (second of three) is sharded over the devices of the mesh."""
    C = config.n_embd

    def plain(params, ids_RP, index_1K):
        return gpt.hidden_states(config, params, ids_RP).reshape(-1, C)[index_1K[0]]

    def shared(params, ids_RP, length_R1, suffix_MRS, n_suffixes, index_1K):
        (R, P), (M, _, S) = ids_RP.shape, suffix_MRS.shape
        shape = config.n_kv_head, config.head_dim, config.dtype
        empty = KVCache.create(config.n_layer, R, shape[0], P, *shape[1:])
        hidden_RPC, prefix = gpt.forward_cached(config, params, ids_RP, empty)
        own = KVCache.create(config.n_layer, R, shape[0], S, *shape[1:])
        cache = KVCache(
            prefix.new_keys,
            prefix.new_values,
            own.new_keys,
            own.new_values,
            start=length_R1[:, 0],
            filled=own.filled,
            previous=jnp.take_along_axis(ids_RP, length_R1 - 1, axis=1)[:, 0],
            new_ids=own.new_ids,
            capacity=P + S,
        )

        def run(m, out_MRSC):
            hidden_RSC, _ = gpt.forward_cached(config, params, suffix_MRS[m], cache)
            return out_MRSC.at[m].set(hidden_RSC)

        out_MRSC = jax.lax.fori_loop(0, n_suffixes, run, jnp.zeros((M, R, S, C), hidden_RPC.dtype))
        return jnp.concatenate([hidden_RPC.reshape(-1, C), out_MRSC.reshape(-1, C)])[index_1K[0]]

    def in_chunks(score, outputs, hidden_KC, asked_KN, count):
        """Runs `score` on as many chunks of rows as `count` says and leaves the rest of the outputs zero."""

        def run(i, out):
            rows = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (hidden_KC, asked_KN))
            new = score(*rows)
            return jax.tree.map(lambda o, x: jax.lax.dynamic_update_slice_in_dim(o, x, i * chunk, 0), out, new)

        return jax.lax.fori_loop(0, (count[0, 0] + chunk - 1) // chunk, run, outputs)

    def nll(params, hidden_KC, target_K1, count):
        def score(hidden, target):
            logits = gpt.unembed(config, params, hidden)
            own = jnp.take_along_axis(logits, target, axis=1)
            return jax.nn.logsumexp(logits, axis=1, keepdims=True) - own, jnp.argmax(logits, 1, keepdims=True) == target

        nothing = jnp.zeros(target_K1.shape, jnp.float32), jnp.zeros(target_K1.shape, bool)
        return in_chunks(score, nothing, hidden_KC, target_K1, count)

    def letters(params, hidden_KC, letter_KN, count):
        def score(hidden, letter):
            kernel = params["lm_head"]["kernel"].astype(hidden.dtype)[:, letter]
            logits = jnp.einsum("kc,ckn->kn", hidden, kernel, preferred_element_type=jnp.float32)
            return config.softcap * jnp.tanh(logits / config.softcap)

        return in_chunks(score, jnp.zeros(letter_KN.shape, jnp.float32), hidden_KC, letter_KN, count)

    if mesh is None:
        return _Programs(*map(jax.jit, (plain, shared, nll, letters)))

    full, rows, options = sharding.replicated_spec(), sharding.batch_spec(2), sharding.batch_spec(3)

    def spread(function, in_specs, out_specs):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(mapped)

    return _Programs(
        spread(plain, (full, rows, rows), rows),
        spread(shared, (full, rows, rows, options, full, rows), rows),
        spread(nll, (full, rows, rows, rows), (rows, rows)),
        spread(letters, (full, rows, rows, rows), rows),
    )
