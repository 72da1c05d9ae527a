"""Loads an exported folder with the target's own library and compares it with what we computed; its own process.

python verify.py TARGET FOLDER EXPECTED.npz     prints a JSON object: {"library": ..., figures} or {"missing": "torch"}

It stands alone on purpose: nothing of this project, and no JAX, is imported beside torch and transformers.

EXPECTED.npz: n; for each of n prompts `prompt<i>` (T,), `logits<i>` and `equal<i>` (T, V) float32 (as trained, and
with the target's rotary tables), `greedy<i>` (N,); `cos`, `sin`: our tables; `texts`: JSON [[text, ids]]; `chats`:
JSON [{"messages", "ids"}].
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def compare(
    logits_of: Callable[[np.ndarray], np.ndarray],
    expected: Any,
    with_our_tables: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Largest logit differences, and how many greedy continuations of ours are also theirs (cached or not: the model's
    own arg-max after every token of ours)."""
    as_shipped = equal = 0.0
    agree, first_difference = 0, None
    n = int(expected["n"])
    for i in range(n):
        prompt, greedy = expected[f"prompt{i}"], expected[f"greedy{i}"]
        theirs = logits_of(np.concatenate([prompt, greedy[:-1]]))
        as_shipped = max(as_shipped, float(np.abs(theirs[: len(prompt)] - expected[f"logits{i}"]).max()))
        if with_our_tables is not None:
            theirs_equal = with_our_tables(prompt)
        else:
            theirs_equal = theirs[: len(prompt)]
        equal = max(equal, float(np.abs(theirs_equal - expected[f"equal{i}"]).max()))
        chosen = theirs[len(prompt) - 1 :].argmax(-1)
        same = chosen == greedy
        agree += bool(same.all())
        if not same.all() and first_difference is None:
            first_difference = {"prompt": i, "token": int(np.argmin(same))}
    found = {"max_diff": as_shipped, "max_diff_equal_tables": equal, "greedy_agree": agree, "greedy": n}
    return {**found, "greedy_tokens": int(min(len(expected[f"greedy{i}"]) for i in range(n)))} | (
        {"first_difference": first_difference} if first_difference else {}
    )


def huggingface(folder: Path, expected: Any) -> dict[str, Any]:
    """With transformers: the model, the tokenizer, the chat template."""
    torch, transformers = _load("torch"), _load("transformers")
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def logits_of(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float().numpy()

    found = compare(logits_of, expected)
    texts, chats = json.loads(str(expected["texts"])), json.loads(str(expected["chats"]))
    plain = [tokenizer.encode(text, add_special_tokens=False) for text, _ in texts]
    found |= {"texts": len(texts), "texts_identical": sum(p == ids for p, (_, ids) in zip(plain, texts, strict=True))}
    rendered = [tokenizer.apply_chat_template(c["messages"], return_dict=False) for c in chats]
    same = sum(r == c["ids"] for r, c in zip(rendered, chats, strict=True))
    return {
        "library": f"transformers {transformers.__version__}",
        **found,
        "chats": len(chats),
        "chats_identical": same,
    }


def reference(folder: Path, expected: Any) -> dict[str, Any]:
    """With torch.load, and the model written down here once more from its description."""
    torch = _load("torch")
    (path,) = folder.glob("*_checkpoints/*/model_*.pt")
    meta = json.loads(path.with_name(path.name.replace("model_", "meta_").replace(".pt", ".json")).read_text())
    config = {"rotary_base": 10000.0, "rotary_dtype": "bfloat16", "softcap": 15.0, **meta["model_config"]}
    state = torch.load(path, map_location="cpu", weights_only=True)
    found = _compare_plain(torch, config, state, expected)
    return {"library": f"torch {torch.__version__}", **found}


def safetensors(folder: Path, expected: Any) -> dict[str, Any]:
    """With safetensors' torch side."""
    torch, library = _load("torch"), _load("safetensors.torch")
    config = json.loads((folder / "nanochat_jax.json").read_text())["config"]
    state: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        state.update(library.load_file(path))
    found = _compare_plain(torch, config, state, expected)
    return {"library": f"safetensors, torch {torch.__version__}", **found}


def _compare_plain(torch: Any, config: dict[str, Any], state: dict[str, Any], expected: Any) -> dict[str, Any]:
    """With torch's own tables, whose rounding to bfloat16 can differ from ours here and there, and with ours."""
    ours = tuple(torch.from_numpy(expected[name]) for name in ("cos", "sin"))
    return compare(
        lambda ids: forward(torch, config, state, ids),
        expected,
        lambda ids: forward(torch, config, state, ids, tuple(table[: len(ids)] for table in ours)),
    )


def forward(torch: Any, config: dict[str, Any], state: dict[str, Any], ids: np.ndarray, tables=None) -> np.ndarray:
    """Softcapped logits (T, V) of one row in float32, plainly; no windows. tables: cos and sin, (T, D / 2) each."""
    T, H, G, C = len(ids), config["n_head"], config["n_kv_head"], config["n_embd"]
    D = C // H
    norm = lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2.0**-23)  # noqa: E731
    if tables is None:
        frequency = 1.0 / config["rotary_base"] ** (torch.arange(0, D, 2).float() / D)
        angle = torch.arange(T).float()[:, None] * frequency[None]
        rounded = torch.bfloat16 if config["rotary_dtype"] == "bfloat16" else torch.float32
        tables = angle.cos().to(rounded).float(), angle.sin().to(rounded).float()
    cos, sin = tables

    def turned(x):  # (heads, T, D)
        a, b = x.chunk(2, -1)
        return norm(torch.cat([a * cos + b * sin, b * cos - a * sin], -1))

    weight = lambda name: state[name].float()  # noqa: E731
    ids = torch.from_numpy(ids.astype(np.int64))
    causal = torch.full((T, T), -torch.inf).triu(1)
    with torch.no_grad():
        x = norm(weight("transformer.wte.weight")[ids])
        for i in range(config["n_layer"]):
            block, y = f"transformer.h.{i}.", norm(x)
            q, k, v = (
                (y @ weight(f"{block}attn.c_{c}.weight").T).view(T, n, D).transpose(0, 1)
                for c, n in (("q", H), ("k", G), ("v", G))
            )
            q, k = turned(q), turned(k).repeat_interleave(H // G, 0)
            attended = torch.softmax(q @ k.transpose(1, 2) / D**0.5 + causal, -1) @ v.repeat_interleave(H // G, 0)
            x = x + attended.transpose(0, 1).reshape(T, C) @ weight(f"{block}attn.c_proj.weight").T
            hidden = torch.relu(norm(x) @ weight(f"{block}mlp.c_fc.weight").T).square()
            x = x + hidden @ weight(f"{block}mlp.c_proj.weight").T
        logits = norm(x) @ weight("lm_head.weight").T
        return (config["softcap"] * torch.tanh(logits / config["softcap"])).numpy()


class _Missing(Exception):
    pass


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _Missing(name.partition(".")[0]) from None


TARGETS = {"hf": huggingface, "reference": reference, "safetensors": safetensors}

if __name__ == "__main__":
    target, folder, expected = sys.argv[1:4]
    try:
        print(json.dumps(TARGETS[target](Path(folder), np.load(expected))))
    except _Missing as missing:
        print(json.dumps({"missing": str(missing)}))
