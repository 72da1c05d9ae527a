"""Conversations to token rows, once, in one of two packings.

``stream`` (midtraining): all rendered conversations one after another, every token supervised. ``best_fit``
(finetuning): unsplit conversations side by side in rows of T+1 tokens, with a loss mask; what is left of a row is
padded with bos, which is never supervised.

Both make one pass over the conversations in their order. The reference goes round: it fills its last batch with the
first conversations again. Here a stream's incomplete last row is left out; best fit empties its buffer in the end, so
nothing is left out.
"""

import contextlib
import itertools
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanochat_jax.data.build_rows import Progress, read_ahead, write_rows
from nanochat_jax.data.packing import (
    NO_CONVERSATIONS,
    BestFitConversations,
    Packer,
    Rendered,
    RenderedConversations,
    Tally,
    TokenStream,
    conversation_pieces,
)
from nanochat_jax.data.row_store import RowsError, RowSet, row_dtype
from nanochat_jax.text import chat_format as rendering
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import InputError

logger = logging.getLogger(__name__)

PACKINGS = ("stream", "best_fit")
# Best fit chooses among this many conversations (the reference's number).
BUFFER = 100
# Part of the identity of the rows: raise it when a rule here or in packing.py changes.
CONVERSATION_ROWS_VERSION = 1

_SHOWN_PROBLEMS = 5  # in a message
_RENDER_AT_ONCE = 512


class Conversations(Protocol):
    """What rows are made from: ``{"messages": [...]}`` by number, and a name that changes when any of them does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def fingerprint(self) -> str: ...


def check_contents(conversation: dict[str, Any]) -> None:
    """Raises ValueError when a user's or the assistant's message is empty or only white space.

    Such a conversation would teach the model to say nothing; the renderer itself accepts it, as the reference does.
    """
    for index, message in enumerate(conversation["messages"]):
        content = message["content"]
        texts = [part["text"] for part in content] if isinstance(content, list) else [content]
        if message["role"] != "system" and all(isinstance(t, str) and (not t or t.isspace()) for t in texts):
            raise InputError(f"message {index} ({message['role']}) is empty")


def render_many(conversations: Iterable[dict[str, Any]], tokenizer: Tokenizer, max_tokens: int) -> list[Rendered | str]:
    """Each conversation as ``tokenizer.render_conversation`` renders it, or the reason why it cannot be used.

    Fast because all texts of all conversations are encoded in one threaded call: ``render_conversation`` gets an
    encoder that notes the text and leaves a negative number in its place, and the ids are put there afterwards.
    """
    texts: list[str] = []

    def note(text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"a part's text is {type(text).__name__}, not a string")
        texts.append(text)
        return [-1]

    layout: list[int] = []  # ids of special tokens, and -1 where the next text goes
    learn: list[int] = []
    ends: list[int] = []  # of each usable conversation in the layout
    found: list[str | None] = []
    for conversation in conversations:
        noted = len(texts)
        try:
            check_contents(conversation)
            ids, mask = rendering.render_conversation(conversation, note, tokenizer.encode_special, sys.maxsize)
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            del texts[noted:]
            found.append(f"no key {error}" if isinstance(error, KeyError) else str(error))
            continue
        layout += ids
        learn += mask
        ends.append(len(layout))
        found.append(None)
    encoded, offsets = tokenizer.encode_to_numpy(texts)  # with a bos before each text, which is dropped here
    encoded = np.delete(encoded, offsets[:-1])
    layout_ids = np.asarray(layout, np.int64)
    is_text = layout_ids < 0
    sizes = np.ones(len(layout_ids), np.int64)
    sizes[is_text] = np.diff(offsets) - 1
    all_ids = np.repeat(np.where(is_text, 0, layout_ids).astype(row_dtype(tokenizer.vocab_size)), sizes)
    all_ids[np.repeat(is_text, sizes)] = encoded
    all_masks = np.repeat(np.asarray(learn, np.uint8), sizes)
    stops = np.concatenate([[0], np.cumsum(sizes)])[np.asarray([0, *ends], np.int64)].tolist()
    spans = iter(itertools.pairwise(stops))

    def cut_out(reason: str | None) -> Rendered | str:
        if reason is not None:
            return reason
        start, stop = next(spans)
        kept = min(stop, start + max_tokens)
        return Rendered(all_ids[start:kept], all_masks[start:kept], kept < stop)

    return [cut_out(reason) for reason in found]


def build_conversation_rows(
    conversations: Conversations,
    tokenizer: Tokenizer,
    T: int,
    *,
    packing: str,
    split: str,
    out_dir: str | Path | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    rows_per_shard: int | None = None,
) -> RowSet:
    """Rows of ``conversations``, as ``build_rows.write_rows`` has it; ``packing`` is "stream" (no masks) or "best_fit".

    A rendered conversation is cut to max(2048, T) tokens (the reference: always to 2048), in best fit also to T+1, so
    that it fits into a row: in the reference a longer one stays in the buffer for ever and at last blocks it.
    Conversations that cannot be used are left out, counted and reported: wrong roles, empty contents, in best fit also
    those without a supervised token (after the cut).

    The manifest tells ``conversations`` (used), ``skipped``, ``truncated``, ``problems`` (the first few, as [index,
    reason]), ``tokens`` (targets), ``supervised_tokens``, ``padding``. Raises RowsError when no conversation can be
    used, when they do not fill one row, or when there is no space.
    """
    if packing not in PACKINGS:
        raise RowsError(f"packing {packing!r} is none of {', '.join(PACKINGS)}")
    if missing := [name for name in _CHAT_TOKENS if name not in tokenizer.special_tokens]:
        raise RowsError(f"the tokenizer lacks {', '.join(missing)}: it cannot render conversations; train one of ours")
    count, best_fit = len(conversations), packing == "best_fit"
    limit = max(rendering.DEFAULT_MAX_TOKENS, T)
    limit = min(limit, T + 1) if best_fit else limit

    def rendered(order: Iterable[int]) -> RenderedConversations:
        return _render_ahead(conversations, order, tokenizer, limit)

    def packer_at(state: Any) -> Packer:
        if best_fit:
            order = itertools.chain(state["buffer"], range(state["next"], count)) if state else range(count)
            dtype = row_dtype(tokenizer.vocab_size)
            return BestFitConversations(T + 1, tokenizer.bos_id, dtype, rendered(order), state, BUFFER)
        before, token = (state["before"], state["token"]) if state else (NO_CONVERSATIONS, 0)
        source = rendered(range(before["conversations"] + before["skipped"], count))
        return TokenStream(T, conversation_pieces(source, before), before, token)

    def judge(tally: Tally, rows: int) -> dict[str, Any]:
        _report(tally, split, count, rows, T + 1, limit)
        return {"packing": packing, **tally, **({} if best_fit else {"supervised_tokens": rows * T})}

    identity = {
        "kind": ["conversations", CONVERSATION_ROWS_VERSION, packing, BUFFER], "source": conversations.fingerprint()
    }  # fmt: skip
    return write_rows(
        identity, tokenizer, T, split, packer_at, judge, name=f"{packing}-", counted="conversations", masked=best_fit,
        out_dir=out_dir, max_rows=max_rows, rows_per_shard=rows_per_shard, progress=progress,
    )  # fmt: skip


_CHAT_TOKENS = (rendering.USER_START, rendering.USER_END, rendering.ASSISTANT_START, rendering.ASSISTANT_END)


def _report(tally: Tally, split: str, total: int, rows: int, need: int, limit: int) -> None:
    shown = "; ".join(f"conversation {index}: {reason}" for index, reason in tally["problems"][:_SHOWN_PROBLEMS])
    if tally["conversations"] == 0:
        why = f" ({shown})" if shown else ""
        raise RowsError(f"none of the {total} {split} conversations can be used{why}; give other conversations")
    if rows == 0:
        raise RowsError(
            f"the {total} {split} conversations are too short for {need} tokens, the least that is needed; give more "
            "of them or shorter rows"
        )
    if tally["skipped"]:
        logger.warning("%d of %d %s conversations left out: %s", tally["skipped"], total, split, shown)
    if tally["truncated"]:
        logger.warning("%d of %d %s conversations cut to %d tokens", tally["truncated"], total, split, limit)


def _render_ahead(
    conversations: Conversations, order: Iterable[int], tokenizer: Tokenizer, limit: int
) -> RenderedConversations:
    """Rendered conversations in ``order``, the next batch being made in a thread."""

    def batches() -> Iterator[list[tuple[int, Rendered | str]]]:
        indices = iter(order)
        while batch := list(itertools.islice(indices, _RENDER_AT_ONCE)):
            rendered = render_many((conversations[index] for index in batch), tokenizer, limit)
            yield list(zip(batch, rendered, strict=True))

    with contextlib.closing(read_ahead(batches())) as ahead:
        for batch in ahead:
            yield from batch
