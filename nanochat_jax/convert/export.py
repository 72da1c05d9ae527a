"""Writes a run for others to use: Hugging Face's transformers (and what runs its models), the reference, safetensors.

python -m scripts.export --to=hf OUT [--run=NAME]
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanochat_jax.convert import InterchangeError, folders, huggingface, reference, tokenizer_json
from nanochat_jax.convert.model_card import model_card
from nanochat_jax.convert.params_reference import params_to_reference
from nanochat_jax.hardware import devices
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model import gpt
from nanochat_jax.model.gpt import GPTConfig, Params
from nanochat_jax.runs import checkpoint
from nanochat_jax.text import chat_format
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils import errors, flags
from nanochat_jax.utils.flags import flag

TARGETS = ("hf", "reference", "safetensors")
GREEDY_TOKENS = 32
LOGIT_TOLERANCE = 1e-3  # on equal tables; 1e-4 is usual, a wrong weight or sign is 1e-1 and more


@dataclass(frozen=True)
class ExportSettings:
    """Flags of scripts.export."""

    to: str | None = flag(None, "for whom", choices=TARGETS)
    out: Path | None = flag(None, "the folder to write (or as the last argument, without --out=)")
    run: str | None = flag(None, "the run to export; default: the newest")
    stage: str | None = flag(None, "the newest run of this stage")
    step: int | None = flag(None, "a checkpoint's step; default: the run's newest")
    overwrite: bool = flag(False, "replace an earlier export in the same folder")
    check: bool = flag(True, "load the result with the target's library, where it is installed, and compare")


@dataclass(frozen=True)
class ExportedModel:
    """What is exported."""

    config: GPTConfig
    params: Params
    tokenizer: Tokenizer
    meta: dict[str, Any]


def export(settings: ExportSettings) -> dict[str, Any]:
    """Writes the folder and returns what the check found ({"missing": library} where it could not be made).

    Raises InterchangeError where the target cannot express the model, where the folder is not free, and where the
    target's library computes something else: then nothing is left behind.
    """
    if settings.to is None or settings.out is None:
        raise InterchangeError(f"say for whom and where: python -m scripts.export --to={'|'.join(TARGETS)} OUT")
    model = ExportedModel(*checkpoint.load_model(settings.run, settings.stage, settings.step))
    if reason := cannot_express(settings.to, model.config, model.tokenizer):
        raise InterchangeError(f"{model.meta['run']} cannot be exported to {settings.to}: {reason}")
    with folders.new_folder(settings.out, settings.overwrite) as folder:
        write(folder, settings.to, model)
        found = check(folder, settings.to, model) if settings.check else {"missing": ""}
        _judge(found, settings.to, folder)
        (folder / "README.md").write_text(model_card(settings.to, model.config, model.tokenizer, model.meta, found))
    print(f"{model.meta['run']}, step {model.meta['step']}, is in {settings.out} ({settings.to})")
    print(shown(found, model.config, settings.to))
    return found


def cannot_express(target: str, config: GPTConfig, tokenizer: Tokenizer) -> str | None:
    """Why the target cannot be this model; None: it can."""
    if target == "hf":
        return huggingface.cannot_express(config)
    return reference.cannot_express(config, tokenizer) if target == "reference" else None


def write(folder: Path, target: str, model: ExportedModel) -> None:
    """Fills a folder: weights, configuration, tokenizer, manifest."""
    config, tokenizer, meta = model.config, model.tokenizer, model.meta
    arrays = params_to_reference(config, model.params, "hugging_face" if target == "hf" else "reference")
    if target == "reference":
        reference.write_checkpoint(folder, config, arrays, tokenizer, meta)
    else:
        huggingface.write_tensors(folder, arrays)
        _json(folder / "tokenizer.json", tokenizer_json.to_json(tokenizer), indent=None)
        for name, content in huggingface.tokenizer_files(config, tokenizer, meta["stage"]).items():
            _json(folder / name, content)
    if target == "hf":
        ends = huggingface.end_tokens(tokenizer, meta["stage"])
        _json(folder / "config.json", huggingface.config_json(config, tokenizer, ends))
    kept = ("stage", "step", "run", "tokenizer_hash", "identity", "settings", "parent", "code", "imported")
    described = {k: meta[k] for k in kept if k in meta}
    manifest = {"target": target, "config": checkpoint.config_to_dict(config), **described}
    _json(folder / folders.MANIFEST, manifest)


def _json(path: Path, content: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the check ------------------------------------------------------------------------------------------------------


def check(folder: Path, target: str, model: ExportedModel) -> dict[str, Any]:
    """Loads the folder in a child process with the target's library and compares (see `verify.py`)."""
    with tempfile.TemporaryDirectory() as temporary:
        expected = Path(temporary) / "expected.npz"
        np.savez(expected, **_expected(target, model))
        command = [sys.executable, str(Path(__file__).with_name("verify.py")), target, str(folder), str(expected)]
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        raise InterchangeError(f"the exported folder does not load in the target's library:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _expected(target: str, model: ExportedModel) -> dict[str, Any]:
    config = dataclasses.replace(model.config, compute_dtype="float32")
    tables = "float32" if target == "hf" else config.rotary_dtype
    equal = dataclasses.replace(config, rotary_dtype=tables)
    prompts = _prompts(model)
    length = max(map(len, prompts))
    cos, sin = gpt.rotary_tables(length, config.head_dim, config.rotary_base, config.rotary_dtype)
    padded = np.array([prompt + [0] * (length - len(prompt)) for prompt in prompts])  # later tokens change no logits
    run = jax.jit(gpt.forward, static_argnums=0)
    logits, logits_equal = (np.asarray(run(how, model.params, padded)) for how in (config, equal))
    out: dict[str, Any] = {"n": len(prompts), "cos": cos, "sin": sin}
    for i, (prompt, greedy) in enumerate(zip(prompts, _greedy(config, model.params, prompts), strict=True)):
        out |= {f"prompt{i}": np.asarray(prompt, np.int32), f"greedy{i}": np.asarray(greedy, np.int32)}
        out |= {f"logits{i}": logits[i, : len(prompt)], f"equal{i}": logits_equal[i, : len(prompt)]}
    out["texts"] = json.dumps([[text, model.tokenizer.encode_text(text)] for text in _TEXTS])
    out["chats"] = json.dumps(
        [{"messages": c, "ids": model.tokenizer.render_conversation({"messages": c})[0]} for c in _chats(model)]
    )
    return out


_TEXTS = (
    "The capital of France is Paris, isn't it?",
    "  two  spaces\n\n\nand\tlines \r\n",
    "3.14159 and 1234567",
    "héllo 你好 🙂",
    "def f(x):\n    return x**2  # squared",
)


def _prompts(model: ExportedModel) -> list[list[int]]:
    """Five prompts of different lengths: bos alone, texts, a question to the assistant, and a long one."""
    tokenizer, bos = model.tokenizer, model.tokenizer.bos_id
    prompts = [[bos], *([bos, *tokenizer.encode_text(text)] for text in ("The", "The capital of France is"))]
    question = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": ""}]
    if chat_format.USER_START in tokenizer.special_tokens:
        prompts.append(tokenizer.render_for_completion({"messages": question}))
    else:
        prompts.append([bos, *tokenizer.encode_text("Who are you?")])
    longest = max(1, min(256, model.config.sequence_len - GREEDY_TOKENS))
    prompts.append(np.random.default_rng(0).integers(0, len(tokenizer.ranks), longest).tolist())
    return [prompt[:longest] for prompt in prompts]


def _chats(model: ExportedModel) -> list[list[dict[str, Any]]]:
    if model.meta["stage"] == "base" or chat_format.USER_START not in model.tokenizer.special_tokens:
        return []
    user, system = {"role": "user", "content": "What is 12+30?"}, {"role": "system", "content": "Be brief."}
    parts = [
        {"type": "text", "text": "I ask: "},
        {"type": "python", "text": "12+30"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "It is 42."},
    ]
    answer = {"role": "assistant", "content": "It is 42."}
    return [
        [user, answer],
        [user, {"role": "assistant", "content": parts}, user, answer],
        [system, user, answer],
        [user],
    ]


def _greedy(config: GPTConfig, params: Params, prompts: list[list[int]]) -> list[list[int]]:
    capacity = min(10 * config.sequence_len, max(map(len, prompts)) + GREEDY_TOKENS)
    engine = Engine(config, params, None, slots=len(prompts), capacity=capacity)
    completions = engine.generate(prompts, SamplingParams(GREEDY_TOKENS, temperature=0.0))
    return [completion.tokens for completion in completions]


def _judge(found: dict[str, Any], target: str, folder: Path) -> None:
    """Raises InterchangeError where the target's library computes something else."""
    if "missing" in found:
        return
    wrong = [f"logits differ by {found['max_diff_equal_tables']:.2g}"] * (
        not found["max_diff_equal_tables"] <= LOGIT_TOLERANCE
    )
    for kind in ("texts", "chats"):
        if found.get(kind, 0) != found.get(f"{kind}_identical", 0):
            wrong.append(f"{found[kind] - found[f'{kind}_identical']} of {found[kind]} {kind} get other ids")
    if wrong:
        raise InterchangeError(
            f"{found['library']} does not compute what we do: {'; '.join(wrong)}. Nothing was written"
        )


def shown(found: dict[str, Any], config: GPTConfig, target: str) -> str:
    """What the check found, for people."""
    if "missing" in found:
        if not found["missing"]:
            return "not checked with the target's library (--check=False)"
        return f"not checked with the target's library: {found['missing']} is not installed here"
    lines = [
        f"checked with {found['library']} in float32: largest logit difference {found['max_diff']:.2g}; "
        f"{found['greedy_agree']} of {found['greedy']} greedy continuations of {found['greedy_tokens']} tokens agree"
    ]
    if target == "hf" and config.rotary_dtype == "bfloat16":
        why = "trained with rotary tables rounded to bfloat16, where transformers uses float32"
    else:
        why = "rotary tables are computed twice, and may round differently"
    lines.append(f"  {why}: with equal tables the largest difference is {found['max_diff_equal_tables']:.2g}")
    if found.get("texts"):
        lines.append(
            f"  identical ids for {found['texts_identical']} of {found['texts']} texts and "
            f"{found['chats_identical']} of {found['chats']} conversations"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 1 error, 2 bad flags."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = folders.take_path(argv, "out", switches=("overwrite", "check"))
    settings = flags.parse(ExportSettings, arguments, __doc__ or "", echo=False)

    def action() -> None:
        devices.prepare("cpu")  # the comparison is made in float32
        export(settings)

    return errors.exit_status(action)
