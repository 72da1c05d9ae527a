"""Makes a run of a model trained elsewhere, after which chat, serve, eval and training work on it as on our own.

python -m scripts.import_checkpoint PATH     a model_*.pt of the reference, its folder or base directory; a Hugging Face
                                             folder of model_type nanochat; a folder of scripts.export
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.convert import (
    InterchangeError,
    folders,
    huggingface,
    params_reference,
    pt_files,
    tokenizer_json,
)
from nanochat_jax.convert import reference as reference_files
from nanochat_jax.evals.results import STAGES
from nanochat_jax.hardware import devices
from nanochat_jax.model.gpt import GPTConfig, Params, num_params
from nanochat_jax.model.parameters import Naming
from nanochat_jax.runs import checkpoint
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils import errors, flags, paths
from nanochat_jax.utils.flags import flag


@dataclass(frozen=True)
class ImportSettings:
    """Flags of scripts.import_checkpoint."""

    path: Path | None = flag(None, "what to import (or as the first argument, without --path=)")
    run_name: str = flag("", "name of the new run; default: the model's folder, and its stage")
    stage: str | None = flag(None, "how far it was trained; default: what its files say", choices=STAGES)
    step: int | None = flag(None, "which of the folder's steps; default: the last")
    tokenizer: Path | None = flag(None, "tokenizer.pkl or tokenizer.json; default: the one beside the model")
    rotary_dtype: str | None = flag(
        None, "precision of the rotary tables it was trained with", choices=("bfloat16", "float32")
    )


@dataclass
class Found:
    """A model that was read: arrays by the names of `naming`."""

    kind: str
    config: GPTConfig
    arrays: Mapping[str, np.ndarray]
    tokenizer: Tokenizer
    stage: str
    step: int
    files: list[Path]
    naming: Naming = "reference"
    notes: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)  # what the files say of the training
    settings: dict[str, Any] = field(default_factory=dict)  # our own, where it was ours


def read(settings: ImportSettings) -> Found:
    """Reads the model that the settings name. Raises InterchangeError, FileNotFoundError."""
    path = settings.path
    if path is None:
        raise InterchangeError("say what to import: python -m scripts.import_checkpoint PATH")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if (path / "snapshots").is_dir():
        path = _snapshot(path)
    if path.is_dir():
        folders.verify(path)
        manifest = folders.manifest(path)
        if manifest.get("target") == "safetensors":
            return _safetensors(path, manifest)
        if (path / "config.json").is_file():
            return _huggingface(path, settings, manifest)
    found = reference_files.find_checkpoint(path, settings.stage, settings.step)
    if found is None:
        raise InterchangeError(
            f"{path} is neither a model_<step>.pt of the reference, nor a folder with one, nor a Hugging Face folder "
            "with a config.json"
        )
    return _reference(found, settings)


def _snapshot(path: Path) -> Path:
    """The newest of the versions of a repository in the hub's cache: the one of main, where that is there."""
    main = path / "refs" / "main"
    if main.is_file() and (named := path / "snapshots" / main.read_text().strip()).is_dir():
        return named
    return max((p for p in (path / "snapshots").iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, default=path)


def _reference(found: reference_files.ReferenceCheckpoint, settings: ImportSettings) -> Found:
    stage = settings.stage or found.stage
    if stage is None:
        raise InterchangeError(
            f"the folder of {found.model} does not tell how far the model was trained: give --stage={'|'.join(STAGES)}"
        )
    notes = []
    meta = huggingface.read_json(found.meta) if found.meta.is_file() else {}
    if not meta:
        notes.append(f"there is no {found.meta.name}: its shape is taken from the tensors")
    arrays = reference_files.read_tensors(found.model)
    config, assumed = reference_files.read_config(meta, arrays, found.meta)
    tokenizer_path = settings.tokenizer or reference_files.find_tokenizer(found.model)
    if tokenizer_path is None:
        raise InterchangeError(f"there is no tokenizer.pkl near {found.model}: give it with --tokenizer=PATH")
    tokenizer = read_tokenizer(tokenizer_path)
    token_bytes = tokenizer_path.with_name("token_bytes.pt")
    if token_bytes.is_file():
        reference_files.check_token_bytes(tokenizer, token_bytes)
    return Found(
        "reference", config, arrays, tokenizer, stage, found.step, [found.model, tokenizer_path],
        notes=[*notes, *assumed], meta=meta,
    )  # fmt: skip


def _huggingface(path: Path, settings: ImportSettings, manifest: dict[str, Any]) -> Found:
    content = huggingface.read_json(path / "config.json")
    rotary = settings.rotary_dtype or manifest.get("config", {}).get("rotary_dtype")
    config, notes = huggingface.read_config(content, path / "config.json", rotary)
    tokenizer = read_tokenizer(settings.tokenizer or path / "tokenizer.json")
    arrays, files = huggingface.read_tensors(path)
    stage = settings.stage or manifest.get("stage")
    if stage is None:
        chat = (path / "chat_template.jinja").is_file()
        if (path / "tokenizer_config.json").is_file():
            chat = chat or "chat_template" in huggingface.read_json(path / "tokenizer_config.json")
        stage = "sft" if chat else "base"
        notes.append(
            f"taken as a {stage} model, as it has {'a' if chat else 'no'} chat template (--stage says otherwise)"
        )
    meta = {"config.json": content, **_told(manifest)}
    return Found(
        "hf", config, arrays, tokenizer, stage, manifest.get("step", 0), files, "hugging_face", notes, meta,
        manifest.get("settings", {}),
    )  # fmt: skip


def _safetensors(path: Path, manifest: dict[str, Any]) -> Found:
    arrays, files = huggingface.read_tensors(path)
    return Found(
        "safetensors", checkpoint.config_from_dict(manifest["config"]), arrays,
        read_tokenizer(path / "tokenizer.json"), manifest["stage"], manifest["step"], files,
        meta=_told(manifest), settings=manifest.get("settings", {}),
    )  # fmt: skip


def _told(manifest: dict[str, Any]) -> dict[str, Any]:
    return {k: manifest[k] for k in ("run", "parent", "identity", "code") if k in manifest}


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.pkl of the reference, or a tokenizer.json (our own form, or Hugging Face's)."""
    if not path.is_file():
        raise InterchangeError(f"there is no tokenizer at {path}: give it with --tokenizer=PATH")
    if path.suffix == ".json":
        if "format" in huggingface.read_json(path):
            return Tokenizer.load(path.parent)
        return tokenizer_json.read(path)
    return pt_files.read_tokenizer(path)


def import_checkpoint(settings: ImportSettings) -> Path:
    """Reads a model and writes it as a run of its own; prints what was found and assumed. Returns the run's folder.

    Raises InterchangeError for files that are damaged, hostile or of another model, listing every missing, unexpected
    or wrongly shaped tensor.
    """
    found = read(settings)
    if found.config.vocab_size < found.tokenizer.vocab_size:
        raise InterchangeError(
            f"the model has {found.config.vocab_size} tokens, its tokenizer {found.tokenizer.vocab_size}: the "
            "tokenizer is another model's (give the right one with --tokenizer=PATH)"
        )
    assert settings.path is not None
    name = settings.run_name or _run_name(settings.path, found)
    with checkpoint.exclusive(checkpoint.run_dir(name)) as folder:
        if folder.exists() and any(folder.iterdir()):
            raise InterchangeError(f"there is a run {folder} already: choose another --run_name")
        params = _params(found)
        folder.mkdir(parents=True, exist_ok=True)
        found.tokenizer.save(folder)
        checkpoint.save(folder, found.step, {"params": params}, _meta(found, settings.path))
    print(
        f"run {name}: {found.stage}, step {found.step}, {num_params(found.config):,} parameters, from {found.kind} "
        f"files; rotary tables {found.config.rotary_dtype}"
    )
    for note in found.notes:
        print(f"note: {note}")
    print(f"talk to it: python -m scripts.chat --run={name}")
    return folder


def _params(found: Found) -> Params:
    try:
        return params_reference.params_from_reference(found.config, found.arrays, found.naming)
    except ValueError as error:
        raise InterchangeError(f"{found.files[0]}: {error}") from error


def _run_name(path: Path, found: Found) -> str:
    folder = found.files[0].parent if found.kind == "reference" or path.is_file() else path
    folder = Path(os.path.abspath(folder))  # links stay: in the hub's cache they lead to folders that mean nothing
    if folder.parent.name == "snapshots":
        folder = folder.parents[1]
    name = folder.name.removeprefix("models--")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "imported"
    return name if name.endswith(f"-{found.stage}") else f"{name}-{found.stage}"


def _meta(found: Found, path: Path) -> dict[str, Any]:
    hashes = {file.name: paths.sha256_file(file) for file in found.files}
    return {
        "stage": found.stage,
        "config": checkpoint.config_to_dict(found.config),
        "tokenizer_hash": found.tokenizer.hash,
        "identity": {"num_iterations": found.step, "imported": next(iter(hashes.values()))},
        "settings": found.settings,
        "imported": {"kind": found.kind, "name": path.name, "files": hashes, "notes": found.notes, "meta": found.meta},
        "evaluated": True,
    }


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 1 error, 2 bad flags."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = flags.parse(ImportSettings, folders.take_path(argv, "path"), __doc__ or "", echo=False)

    def action() -> None:
        devices.prepare("cpu")
        import_checkpoint(settings)

    return errors.exit_status(action)
