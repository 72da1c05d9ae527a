"""The reference's files, in and out.

base_checkpoints/d20/model_021400.pt, meta_021400.json     likewise mid_, chatsft_ and chatrl_checkpoints
tokenizer/tokenizer.pkl, token_bytes.pt
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.convert import InterchangeError, pt_files
from nanochat_jax.model.config import MODERN, GPTConfig
from nanochat_jax.text.tokenizer import Tokenizer

STAGE_FOLDERS = {
    "base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"
}  # fmt: skip
CONFIG_FIELDS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_MODEL = re.compile(r"model_(\d+)\.pt")
# Tensors that the reference's models have since July 2026.
_MODERN_TENSORS = re.compile(r"(resid|x0)_lambdas|value_embeds\.|smear_(gate|lambda)|backout_lambda|ve_gate\.")


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """Where one checkpoint of the reference lies. stage is None where its folder does not tell."""

    model: Path
    step: int
    stage: str | None

    @property
    def meta(self) -> Path:
        return self.model.with_name(self.model.name.replace("model_", "meta_").replace(".pt", ".json"))


def find_checkpoint(path: Path, stage: str | None = None, step: int | None = None) -> ReferenceCheckpoint | None:
    """The checkpoint that a path means: a model file, its folder, or the reference's base directory; None: none there.

    Among several steps the last, among several stages the latest. Raises InterchangeError where that leaves two models,
    or the step asked for is not there.
    """
    if path.is_file():
        return _checkpoint_at(path) if _MODEL.fullmatch(path.name) else None
    folders = [path] if any(path.glob("model_*.pt")) else []
    if not folders:
        for name in [stage] if stage else reversed(STAGE_FOLDERS):
            if folders := sorted({p.parent for p in path.glob(f"{STAGE_FOLDERS[name]}/*/model_*.pt")}):
                break
    if len(folders) > 1:
        raise InterchangeError(f"{path} has several models: give one of {', '.join(map(str, folders))}")
    if not folders:
        return None
    found = {c.step: c for p in folders[0].glob("model_*.pt") if (c := _checkpoint_at(p))}
    if step is not None and step not in found:
        raise InterchangeError(f"{folders[0]} has no model of step {step}; it has {sorted(found)}")
    return found[max(found) if step is None else step] if found else None


def _checkpoint_at(model: Path) -> ReferenceCheckpoint | None:
    match = _MODEL.fullmatch(model.name)
    if match is None:
        return None
    folders = [place.parent.parent.name for place in _places(model)]
    stage = next((s for s, name in STAGE_FOLDERS.items() if name in folders), None)
    return ReferenceCheckpoint(model, int(match[1]), stage)


def _places(file: Path) -> list[Path]:
    """Where a file is: as it is named, and where the links lead (in the hub's cache to a folder that means nothing)."""
    return [Path(os.path.abspath(file)), file.resolve()]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The state dict of a model file, without torch.compile's prefix. Raises InterchangeError."""
    tree = pt_files.read(path)
    if not isinstance(tree, dict) or not all(isinstance(k, str) and isinstance(v, np.ndarray) for k, v in tree.items()):
        raise InterchangeError(f"{path} is not a state dict of tensors by name")
    arrays = {name.removeprefix("_orig_mod."): array for name, array in tree.items()}
    if len(arrays) < len(tree):
        raise InterchangeError(f"{path} has tensors both with and without the prefix _orig_mod.")
    return arrays


def read_config(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray], path: Path) -> tuple[GPTConfig, list[str]]:
    """(config, notes on what was assumed): the meta file's `model_config`, from the tensors what it leaves out, and
    which of the recipes it is. The smear of a modern model crosses documents, as it was trained."""
    recorded = meta.get("model_config", {})
    given: dict[str, Any] = dict(recorded) if isinstance(recorded, dict) else {CONFIG_FIELDS[0]: recorded}
    parts: dict[str, Any] = {}
    if any(_MODERN_TENSORS.search(name) for name in arrays):
        pattern = str(given.pop("window_pattern", "L")).upper()
        parts = {**MODERN, "smear_across_documents": True, "window_pattern": pattern}
    elif "window_pattern" in given:
        raise InterchangeError(
            f"{path}: model_config has a window_pattern, as models of July 2026 have, but the tensors lack the parts "
            "of that recipe (resid_lambdas and others)"
        )
    if not all(isinstance(given.get(k, 1), int) for k in CONFIG_FIELDS):
        raise InterchangeError(f"{path}: model_config must hold integers: {', '.join(CONFIG_FIELDS)}")
    if unknown := sorted(set(given) - set(CONFIG_FIELDS)):
        raise InterchangeError(f"{path}: model_config has fields that no model of the reference has: {unknown}")
    inferred, notes = _infer(arrays, given), []
    assumed = [k for k in CONFIG_FIELDS if k not in given]
    if assumed:
        notes.append(f"{path.name} lacks {', '.join(f'{k} (taken: {inferred[k]})' for k in assumed)}")
    try:
        return GPTConfig(**{**parts, **inferred, **given}), notes
    except ValueError as error:
        raise InterchangeError(f"{path}: {error}") from error


def _infer(arrays: Mapping[str, np.ndarray], given: Mapping[str, int]) -> dict[str, int]:
    wte, key = arrays.get("transformer.wte.weight"), arrays.get("transformer.h.0.attn.c_k.weight")
    if wte is None or wte.ndim != 2 or key is None or key.ndim != 2:
        raise InterchangeError(
            "the tensors have no transformer.wte.weight and transformer.h.0.attn.c_k.weight: not a nanochat model; "
            f"they are {', '.join(sorted(arrays)[:8])} ..."
        )
    width = wte.shape[1]
    heads = given.get("n_head", max(1, math.ceil(width / 128)))  # the reference's rule
    layers = {name.split(".")[2] for name in arrays if name.startswith("transformer.h.")}
    return {
        "sequence_len": 2048,
        "vocab_size": wte.shape[0],
        "n_layer": len(layers),
        "n_head": heads,
        "n_kv_head": max(1, key.shape[0] * heads // width),
        "n_embd": width,
    }


def find_tokenizer(near: Path) -> Path | None:
    """The tokenizer that belongs to a model file: in its folder, or in `tokenizer/` of the base directory above it."""
    for model in _places(near):
        for folder in (model.parent, model.parent / "tokenizer", model.parent.parent.parent / "tokenizer"):
            for name in ("tokenizer.pkl", "tokenizer.json"):
                if (folder / name).is_file():
                    return folder / name
    return None


def check_token_bytes(tokenizer: Tokenizer, path: Path) -> None:
    """Refuses a token_bytes.pt that does not belong to the tokenizer (it may count either as v1 or exactly)."""
    found = pt_files.read(path)
    for v1_compat in (True, False):
        if isinstance(found, np.ndarray) and np.array_equal(found, tokenizer.token_bytes(v1_compat)):
            return
    raise InterchangeError(
        f"{path} does not hold the byte lengths of the tokenizer beside it: one of the two is another model's"
    )


# --- out -------------------------------------------------------------------------------------------------------------


def cannot_express(config: GPTConfig, tokenizer: Tokenizer) -> str | None:
    """Why the reference, in either of its recipes, cannot load this model; None: it can."""
    neutral = GPTConfig()
    fixed: dict[str, Any] = {"softcap": neutral.softcap}
    free = {"initialisation", "vocab_multiple"}
    if not set(config.parts) - free - {"window_pattern", "rotary_base", "rotary_dtype"}:
        fixed |= {name: getattr(neutral, name) for name in ("rotary_base", "rotary_dtype", "window_pattern")}
    else:
        fixed |= {name: value for name, value in MODERN.items() if name not in free | {"window_pattern"}}
        padded = dataclasses.replace(config, vocab_multiple=MODERN["vocab_multiple"]).padded_vocab_size
        if config.padded_vocab_size != padded:
            fixed["vocab_multiple"] = MODERN["vocab_multiple"]
    for name, value in fixed.items():
        if getattr(config, name) != value:
            return f"{name} is {getattr(config, name)}, and the reference has {value} built in"
    if config.vocab_size != tokenizer.vocab_size:
        sizes = f"the model has {config.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}"
        return f"{sizes}; the reference needs them equal"
    if "<|bos|>" not in tokenizer.special_tokens:
        return "its tokenizer has no <|bos|>"
    return None


def write_checkpoint(
    folder: Path, config: GPTConfig, arrays: Mapping[str, np.ndarray], tokenizer: Tokenizer, meta: dict
) -> None:
    """Writes a checkpoint and its tokenizer as the reference's base directory holds them."""
    place = folder / STAGE_FOLDERS[meta["stage"]] / f"d{config.n_layer}"
    place.mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    step = meta["step"]
    modern = any(_MODERN_TENSORS.search(name) for name in arrays)
    fields = (*CONFIG_FIELDS, "window_pattern") if modern else CONFIG_FIELDS
    with open(place / f"model_{step:06d}.pt", "wb") as file:
        pt_files.write(file, arrays)
    document = {
        "step": step,
        "model_config": {name: getattr(config, name) for name in fields},
        "user_config": {k: v for k, v in meta.get("settings", {}).items() if isinstance(v, int | float | bool | str)},
        "device_batch_size": meta.get("settings", {}).get("device_batch_size", 1),
        "max_seq_len": config.sequence_len,
    }
    (place / f"meta_{step:06d}.json").write_text(json.dumps(document, indent=2))
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pt_files.tokenizer_bytes(tokenizer))
    with open(folder / "tokenizer" / "token_bytes.pt", "wb") as file:
        pt_files.write(file, tokenizer.token_bytes(v1_compat=not modern))
