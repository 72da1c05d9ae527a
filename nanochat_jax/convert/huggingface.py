"""Hugging Face folders of `model_type: nanochat`, in and out: config.json, safetensors, the tokenizer's files.

`transformers` computes rotary tables in float32 where the reference rounds them to bfloat16; everything else about the
model can be said in config.json.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanochat_jax.convert import InterchangeError, pt_files
from nanochat_jax.convert.chat_template import chat_template
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.layers import NORM_EPS
from nanochat_jax.text import chat_format
from nanochat_jax.text.tokenizer import Tokenizer

MODEL_TYPE, ARCHITECTURE = "nanochat", "NanoChatForCausalLM"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 << 30


# --- out -------------------------------------------------------------------------------------------------------------


def cannot_express(config: GPTConfig) -> str | None:
    """Why `transformers`' nanochat model cannot be this one; None: it can."""
    known = {"rotary_base", "rotary_dtype", "initialisation"} | (
        {"vocab_multiple"} if config.padded_vocab_size == config.vocab_size else set()
    )
    if parts := [f"{name}={getattr(config, name)}" for name in config.parts if name not in known]:
        return f"its model has no {', '.join(parts)}"
    return None


def config_json(config: GPTConfig, tokenizer: Tokenizer, ends: list[int]) -> dict[str, Any]:
    """The contents of config.json. ends: ids that end an answer."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.bos_id,
        "dtype": "float32",
        "eos_token_id": ends,
        "final_logit_softcapping": config.softcap,
        "hidden_act": "relu2",
        "hidden_size": config.n_embd,
        "initializer_range": 0.02,
        "intermediate_size": 4 * config.n_embd,
        "max_position_embeddings": config.sequence_len,
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "num_key_value_heads": config.n_kv_head,
        "pad_token_id": ends[0],
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_theta": config.rotary_base, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def end_tokens(tokenizer: Tokenizer, stage: str) -> list[int]:
    """Ids that end an answer, the usual one first: the assistant's end for a chat model, bos for a base model."""
    end = tokenizer.special_tokens.get(chat_format.ASSISTANT_END)
    if end is None:
        return [tokenizer.bos_id]
    return [tokenizer.bos_id, end] if stage == "base" else [end, tokenizer.bos_id]


def tokenizer_files(config: GPTConfig, tokenizer: Tokenizer, stage: str) -> dict[str, dict[str, Any]]:
    """tokenizer_config.json, special_tokens_map.json, generation_config.json."""
    ends = end_tokens(tokenizer, stage)
    bos, end = tokenizer.decode([tokenizer.bos_id]), tokenizer.decode(ends[:1])
    named = {"bos_token": bos, "eos_token": end, "pad_token": end}
    others = [name for name in tokenizer.special_tokens if name not in named.values()]
    settings: dict[str, Any] = {
        **named,
        "additional_special_tokens": others,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.sequence_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if stage != "base" and chat_format.USER_START in tokenizer.special_tokens:
        settings["chat_template"] = chat_template(list(tokenizer.special_tokens))
    return {
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {**named, "additional_special_tokens": others},
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": ends,
            "pad_token_id": ends[0],
            "do_sample": True,  # as scripts.chat
            "temperature": 0.6,
            "top_k": 50,
            "max_new_tokens": 256,
        },
    }


def write_tensors(folder: Path, arrays: Mapping[str, np.ndarray], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """model.safetensors, or shards and their index where the arrays are larger than one shard may be."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in arrays.items():
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = np.ascontiguousarray(array)
    metadata = {"format": "pt"}
    where = {}
    for i, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata)
        (folder / file).chmod(0o644)  # the library leaves it readable for its owner alone
        where.update(dict.fromkeys(shard, file))
    if len(shards) == 1:
        return
    total = sum(array.nbytes for array in arrays.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))


# --- in --------------------------------------------------------------------------------------------------------------


def read_config(content: Mapping[str, Any], path: Path, rotary_dtype: str | None) -> tuple[GPTConfig, list[str]]:
    """(config, notes on what was assumed) of a config.json, newer and older forms; refuses what this model is not."""
    if content.get("model_type") != MODEL_TYPE:
        raise InterchangeError(f"{path} has model_type {content.get('model_type')!r}; only {MODEL_TYPE!r} is read")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    width, heads = _need(content, "hidden_size", path), _need(content, "num_attention_heads", path)
    softcap = content.get("final_logit_softcapping", content.get("logits_soft_cap", 15.0))
    eps = content.get("rms_norm_eps", 1e-6)
    wrong = {
        "attention biases": content.get("attention_bias") or content.get("qkv_bias"),
        f"hidden_act {content.get('hidden_act')!r}": content.get("hidden_act", "relu2") != "relu2",
        f"intermediate_size {content.get('intermediate_size')}": content.get("intermediate_size") != 4 * width,
        "tied embeddings": content.get("tie_word_embeddings"),
        f"rope type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        f"head_dim {content.get('head_dim')}": content.get("head_dim", width // heads) != width // heads,
        "no logit softcap": not softcap,
        f"rms_norm_eps {eps}": not 0 <= eps <= 1e-5,
    }
    found = [name for name, is_wrong in wrong.items() if is_wrong]
    if found:
        raise InterchangeError(f"{path} describes a model that cannot run here: {', '.join(found)}")
    notes = []
    if not math.isclose(eps, NORM_EPS, rel_tol=1e-3):
        notes.append(f"rms_norm_eps is {eps:g} there and {NORM_EPS:.9g} here (as the reference trains)")
    if rotary_dtype is None:
        rotary_dtype = "bfloat16" if content.get("dtype", content.get("torch_dtype")) == "bfloat16" else "float32"
        notes.append(f"rotary tables are taken to be {rotary_dtype}, as transformers computes them for these weights")
    return (
        GPTConfig(
            sequence_len=content.get("max_position_embeddings", 2048),
            vocab_size=_need(content, "vocab_size", path),
            n_layer=_need(content, "num_hidden_layers", path),
            n_head=heads,
            n_kv_head=content.get("num_key_value_heads") or heads,
            n_embd=width,
            rotary_base=float(rope.get("rope_theta", content.get("rope_theta", 10000.0))),
            rotary_dtype=rotary_dtype,
            softcap=float(softcap),
        ),
        notes,
    )


def _need(content: Mapping[str, Any], key: str, path: Path) -> int:
    value = content.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InterchangeError(f"{path} needs {key}, a positive integer; it has {value!r}")
    return value


def read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], list[Path]]:
    """(arrays by the file's own names, the files): one safetensors file, an index and its shards, or a torch file."""
    if (folder / INDEX).is_file():
        where = read_json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) and "/" not in f for f in where.values()):
            raise InterchangeError(f"{folder / INDEX} has no weight_map of names to files beside it")
        files = [folder / name for name in sorted(set(where.values()))]
    elif (folder / WEIGHTS).is_file():
        where, files = None, [folder / WEIGHTS]
    elif (folder / "pytorch_model.bin").is_file():
        path = folder / "pytorch_model.bin"
        return dict(pt_files.read(path)), [path]
    else:
        raise InterchangeError(f"{folder} has no {WEIGHTS}, {INDEX} or pytorch_model.bin")
    arrays: dict[str, np.ndarray] = {}
    for path in files:
        arrays.update(read_safetensors(path))
    if where is not None and (absent := sorted(set(where) - set(arrays))):
        raise InterchangeError(f"{folder / INDEX} lists tensors that its files lack: {', '.join(absent)}")
    return arrays, files


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All arrays of one safetensors file."""
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InterchangeError(f"{path} is missing or damaged ({error}); fetch it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InterchangeError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InterchangeError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InterchangeError(f"{path} holds no JSON object")
    return content
