"""The `tokenizer.json` of Hugging Face's `tokenizers` library, in and out: plain JSON, for which no library is needed.

tiktoken merges the neighbouring pair whose joined bytes have the lowest id; `tokenizers` merges by a list of pairs.
They agree if the list holds, in the order of ids, the one pair that each token is finally made of: before a token's
last merge, everything inside it has been merged as if it stood alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat_jax.convert import InterchangeError
from nanochat_jax.text.chat_format import BOS
from nanochat_jax.text.tokenizer import Tokenizer, TokenizerError


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself where it is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in visible]
    return [chr(b) if b in visible else chr(0x100 + hidden.index(b)) for b in range(256)]


_LETTERS = _byte_letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}


def spelled(token: bytes) -> str:
    """A token's bytes in GPT-2's letters."""
    return "".join(_LETTERS[b] for b in token)


def merges(ranks: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """For each token that two others can be merged to, the pair that the merging of its own bytes ends with, by id.

    A token without one (no chain of merges leads to it) is found only where it is a whole piece of text.
    """
    known = {token: rank for rank, token in enumerate(ranks)}
    found = []
    for rank, token in enumerate(ranks):
        if len(token) < 2:
            continue
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [known.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            lowest = min(pairs)
            if lowest >= rank:
                break
            at = pairs.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2 and parts[0] in known and parts[1] in known:
            found.append((parts[0], parts[1]))
    return found


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of a `tokenizer.json` that gives the same ids.

    Encoding puts bos in front unless `add_special_tokens` is false. Special tokens in text are recognised, as the
    library does it (`encode_special_tokens = True` makes them plain text, as they are here).
    """
    bos, bos_id = tokenizer.decode([tokenizer.bos_id]), tokenizer.bos_id
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for name, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    ]
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": bytewise,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken looks a whole piece up before it merges
            "vocab": {spelled(token): rank for rank, token in enumerate(tokenizer.ranks)},
            "merges": [[spelled(a), spelled(b)] for a, b in merges(tokenizer.ranks)],
        },
    }


def read(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json` of a byte-level BPE, refused if ours would give other ids.

    Raises InterchangeError naming what is not supported: another model, a normaliser, another splitter, merges in an
    order that the ids do not follow, ids with gaps.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        if model.get("type") != "BPE" or content.get("normalizer") is not None:
            raise InterchangeError(f"{path} is not a byte-level BPE without normalizer; only that is supported")
        unsupported = {"unk_token", "continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback"}
        used = sorted(k for k in unsupported if model.get(k))
        if used:
            raise InterchangeError(f"{path} uses {', '.join(used)}, which is not supported")
        special = {t["content"]: t["id"] for t in content["added_tokens"]}
        vocab = {token: rank for token, rank in model["vocab"].items() if token not in special}
        listed = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        tokens = sorted(vocab, key=lambda token: vocab[token])
        if [vocab[token] for token in tokens] != list(range(len(tokens))):
            raise InterchangeError(f"{path}: its token ids have gaps, or special tokens do not come last")
        ranks = [bytes(_BYTES[letter] for letter in token) for token in tokens]
        tokenizer = Tokenizer(ranks, special, _pattern(content["pre_tokenizer"], path), _bos(special))
        _check_merges(tokenizer, listed, path)
        return tokenizer
    except InterchangeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, TokenizerError) as error:
        raise InterchangeError(
            f"{path} is damaged or no tokenizer.json of a byte-level BPE ({type(error).__name__}: {error})"
        ) from error


def _bos(special: dict[str, int]) -> str:
    return BOS if BOS in special else "<|endoftext|>"


def _pattern(pre_tokenizer: dict[str, Any], path: Path) -> str:
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    match steps:
        case [
            {"type": "Split", "pattern": {"Regex": str() as pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
    raise InterchangeError(f"{path}: text is split in another way than by one pattern and into bytes: not supported")


def _check_merges(tokenizer: Tokenizer, listed: list[tuple[str, ...]], path: Path) -> None:
    """The list must hold our pairs in our order. More pairs for the same tokens, as transformers' own conversion of
    tiktoken files writes them, change nothing: the first to come up is ours."""
    order = {spelled(token): rank for rank, token in enumerate(tokenizer.ranks)}
    made = ["".join(pair) for pair in listed]
    unknown = [token for token in made if token not in order]
    ascending = all(order[a] <= order[b] for a, b in zip(made, made[1:], strict=False)) if not unknown else False
    missing = {(spelled(a), spelled(b)) for a, b in merges(tokenizer.ranks)} - set(listed)
    if unknown or missing or not ascending:
        raise InterchangeError(
            f"{path}: its merges do not follow the ids of its tokens, as they do in a tokenizer of nanochat: text "
            "would get other ids here"
        )
