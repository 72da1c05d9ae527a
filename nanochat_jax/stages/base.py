"""Pretraining: its flags, its rows, its evaluation. The loop is `train.fit`."""

import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from nanochat_jax import checkpoint, devices, metrics, sharding
from nanochat_jax.cli import flag
from nanochat_jax.data.loader import RowLoader, val_batches
from nanochat_jax.data.rows import RowSet, build_rows
from nanochat_jax.data.sources import TextSource, text_source
from nanochat_jax.engine import Engine
from nanochat_jax.evals.bpb import bits_per_byte
from nanochat_jax.optim import OptimHyper, lr_schedule, make_optimizer
from nanochat_jax.plan import BasePlan
from nanochat_jax.progress import RowsProgress
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import Batch, Job, Outcome, fit
from nanochat_jax.train_step import (
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
    restore_padding,
    strip_padding,
)

logger = logging.getLogger(__name__)

# The reference's prompts, so that samples can be compared with its logs.
PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


@dataclass(frozen=True)
class BaseSettings:
    """Flags of --stage=base. Names and defaults are the reference's where it has them."""

    run_name: str = flag("", "name of the run's folder; default base-d<depth>")
    depth: int = flag(20, "the one dial: layers; width is 64 x depth, everything else follows")
    max_seq_len: int = flag(2048, "context length in tokens")
    num_iterations: int = flag(-1, "optimizer steps; -1: from target_flops or target_param_data_ratio")
    target_flops: float = flag(-1.0, "stop at about this many training FLOPs; -1: not used")
    target_param_data_ratio: float = flag(20.0, "training tokens per parameter")
    device_batch_size: int = flag(
        32, "rows per device and micro-step; lower it if memory runs out, the mathematics stays"
    )
    total_batch_size: int = flag(524288, "tokens per optimizer step, reached by accumulation")
    embedding_lr: float = flag(0.2, "AdamW learning rate of the embedding at width 768")
    unembedding_lr: float = flag(0.004, "AdamW learning rate of the unembedding at width 768")
    matrix_lr: float = flag(0.02, "Muon learning rate of the matrices")
    weight_decay: float = flag(0.0, "decoupled weight decay of the embeddings")
    grad_clip: float = flag(1.0, "largest global gradient norm; 0: no clipping")
    warmup_ratio: float = flag(0.0, "share of the steps with a rising learning rate")
    warmdown_ratio: float = flag(0.2, "share of the steps with a falling learning rate")
    final_lr_frac: float = flag(0.0, "learning rate at the very end, as a share")
    data: str = flag("", "file or folder of your own text (parquet, txt, md, jsonl); default: the downloaded shards")
    text_column: str = flag("text", "name of the text column or key in parquet and jsonl files")
    demo: bool = flag(False, "train on the embedded demo data with small defaults (they change with this flag)")
    eval_every: int = flag(250, "steps between evaluations; 0: only at the end")
    eval_tokens: int = flag(20 * 524288, "tokens of held-out text per evaluation")
    sample_every: int = flag(2000, "steps between samples; 0: only at the end")
    save_every: int = flag(1000, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)")
    keep: int = flag(2, "newest checkpoints kept; 0: all")
    resume: bool = flag(True, "go on with an existing run; False sets the old folder aside and starts anew")
    seed: int = flag(42, "seed of initialisation and data order")
    remat: str = flag("none", "activations recomputed in the backward pass: none, mlp, block")
    device: str = flag("auto", "auto, cpu or gpu")
    sinks: str = flag("", "further metric sinks, comma-separated: wandb, tensorboard (metrics.jsonl is always written)")


@dataclass(frozen=True)
class DemoSettings(BaseSettings):
    """The same flags with defaults for the embedded demo data on two CPU cores."""

    demo: bool = flag(True, "train on the embedded demo data with these small defaults")
    depth: int = flag(4, "the one dial: layers; width is 64 x depth, everything else follows")
    max_seq_len: int = flag(256, "context length in tokens")
    num_iterations: int = flag(400, "optimizer steps")
    device_batch_size: int = flag(16, "rows per device and micro-step")
    total_batch_size: int = flag(4096, "tokens per optimizer step, reached by accumulation")
    warmdown_ratio: float = flag(0.4, "share of the steps with a falling learning rate")
    eval_every: int = flag(150, "steps between evaluations; 0: only at the end")
    eval_tokens: int = flag(65536, "tokens of held-out text per evaluation")
    sample_every: int = flag(150, "steps between samples; 0: only at the end")
    save_every: int = flag(75, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)")


# Settings that may differ between the parts of one run: they change neither the mathematics nor the data order.
_FREE = {
    "run_name", "device_batch_size", "eval_every", "eval_tokens", "sample_every", "save_every", "keep", "resume",
    "remat", "device", "sinks", "target_flops", "target_param_data_ratio", "num_iterations", "data", "text_column",
}  # fmt: skip


def run(settings: BaseSettings) -> Outcome:
    """Pretrains, or goes on pretraining, one model. Returns what `fit` returns; prints as it goes."""
    devices.prepare(settings.device)
    print(f"device: {devices.check(settings.device)}")
    tokenizer = Tokenizer.load()
    mesh = sharding.make_mesh()
    plan = BasePlan.from_settings(settings, vocab_size=tokenizer.vocab_size, devices=mesh.size)
    config = dataclasses.replace(plan.config, remat=settings.remat)
    print(plan.describe())
    source = text_source(settings.data, settings.demo, settings.text_column)
    with checkpoint.exclusive(checkpoint.run_dir(settings.run_name or f"base-d{settings.depth}")) as folder:
        return _train(settings, folder, tokenizer, plan, config, source, mesh)


def _train(settings: BaseSettings, folder: Path, tokenizer: Tokenizer, plan: BasePlan, config, source, mesh) -> Outcome:
    """Everything that happens inside the run's folder, which nobody else uses meanwhile."""
    _open_run(folder, settings, tokenizer)
    train_rows, val_rows = make_rows(source, tokenizer, plan, settings.eval_tokens)

    hyper = OptimHyper(**{f: getattr(settings, f) for f in _fields_of(OptimHyper) & _fields_of(BaseSettings)})
    optimizer = make_optimizer(hyper, plan.num_iterations, config.n_embd)
    identity = {
        **{k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE},
        "num_iterations": plan.num_iterations,
        "rows": train_rows.key,
    }
    state, evaluated = _start_or_resume(folder, settings, identity, config, optimizer, mesh)

    peak, peak_source = devices.peak_flops()
    print(f"peak for MFU: {peak / 1e12:.3g} TFLOP/s per device ({peak_source})")
    schedule = lr_schedule(hyper, plan.num_iterations)
    unpadded = abstract_state(config, optimizer, mesh, padded=False)
    rows_per_step = plan.total_batch_size // plan.max_seq_len
    job = Job(
        run=folder,
        num_iterations=plan.num_iterations,
        train_step=make_train_step(config, optimizer, mesh, settings.grad_clip),
        batches=lambda step: micro_batches(RowLoader(train_rows, rows_per_step, settings.seed), step, plan.grad_accum),
        meta={
            "stage": "base",
            "config": checkpoint.config_to_dict(config),
            "tokenizer_hash": tokenizer.hash,
            "identity": identity,
            "settings": dataclasses.asdict(settings),
        },
        tokens_per_step=plan.total_batch_size,
        flops_per_token=plan.flops_per_token,
        peak_flops=peak * mesh.size,
        evaluate=_evaluator(config, val_rows, settings, tokenizer, mesh),
        sample=_sampler(config, tokenizer),
        eval_every=settings.eval_every,
        sample_every=settings.sample_every,
        save_every=settings.save_every,
        keep=settings.keep,
        sinks=metrics.open_sinks(settings.sinks, folder.name, folder, dataclasses.asdict(settings)),
        schedule=lambda step: {"lr_multiplier": schedule(step)},
        to_saved=lambda s: strip_padding(s, unpadded),
    )
    outcome = fit(job, state, evaluated)
    if outcome.finished:
        print(f"run {folder.name} is complete: held-out bits per byte {outcome.results['val_bpb']:.4f}")
    return outcome


def _fields_of(cls) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _open_run(folder: Path, settings: BaseSettings, tokenizer: Tokenizer) -> None:
    """Makes the folder with its own copy of the tokenizer; an old run is set aside if it is not to be resumed."""
    if folder.exists() and not settings.resume:
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
            number += 1
        os.rename(folder, aside)
        print(f"the earlier run is kept as {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    if not checkpoint.steps(folder):
        tokenizer.save(folder)


def _start_or_resume(folder: Path, settings, identity, config, optimizer, mesh) -> tuple[TrainState, bool]:
    """(state, whether its step was already evaluated): the newest checkpoint's, or a fresh one."""
    if not checkpoint.steps(folder):
        return init_state(config, optimizer, mesh, jax.random.key(settings.seed)), False
    meta = checkpoint.load_meta(folder)
    now, then = Tokenizer.load().hash, meta["tokenizer_hash"]
    if now != then:
        raise checkpoint.CheckpointError(
            f"{folder} was trained with tokenizer {then[:12]}, but the current one is {now[:12]}. Train a new run with "
            f"--run_name=NAME, or put the old tokenizer back: it is kept as {folder / 'tokenizer.json'}"
        )
    changed = [k for k in identity if identity[k] != meta["identity"].get(k)]
    if changed:
        details = ", ".join(f"{k}: {meta['identity'].get(k)} -> {identity[k]}" for k in changed)
        raise checkpoint.CheckpointError(
            f"the run in {folder} was started with other settings ({details}). Use the old settings to go on, another "
            "--run_name for a new run beside it, or --resume=False to set the old one aside."
        )
    saved = checkpoint.restore(folder, meta["step"], abstract_state(config, optimizer, mesh, padded=False))
    print(f"going on with {folder} from step {meta['step']}")
    return restore_padding(saved, abstract_state(config, optimizer, mesh)), meta["evaluated"]


def make_rows(source: TextSource, tokenizer: Tokenizer, plan: BasePlan, eval_tokens: int) -> tuple[RowSet, RowSet]:
    """Training rows for the whole horizon (or all there are: the run then passes over them again) and held-out rows."""
    T = plan.max_seq_len
    needed = plan.num_iterations * (plan.total_batch_size // T)
    with RowsProgress("training rows", needed) as progress:
        train = build_rows(source.train, tokenizer, T, split="train", max_rows=needed, progress=progress)
    with RowsProgress("held-out rows", -(-eval_tokens // T)) as progress:
        val = build_rows(source.val, tokenizer, T, split="val", max_tokens=eval_tokens, progress=progress)
    epochs = needed / len(train)
    again = f"; the run passes over them {epochs:.1f} times" if epochs > 1 else ""
    print(f"data: {source.description}: {len(train):,} training rows of {T} tokens, {len(val):,} held out{again}")
    return train, val


def micro_batches(loader: RowLoader, step: int, accumulation: int) -> Iterator[Batch]:
    """Batches from `step` on, cut into (accumulation, rows, T)."""
    iterator = loader.iterate(step)
    try:
        for batch in iterator:
            inputs, targets, weights = (a.reshape(accumulation, -1, a.shape[-1]) for a in batch)
            yield inputs, targets, weights
    finally:
        iterator.close()


def _evaluator(config, val_rows: RowSet, settings: BaseSettings, tokenizer: Tokenizer, mesh):
    rows = min(settings.device_batch_size * mesh.size, -(-len(val_rows) // mesh.size) * mesh.size)
    token_bytes = tokenizer.token_bytes()

    def evaluate(params) -> dict[str, float]:
        batches = ((x, y) for x, y, _ in val_batches(val_rows, rows))
        return {"val_bpb": bits_per_byte(config, params, batches, token_bytes, mesh)}

    return evaluate


def _sampler(config, tokenizer: Tokenizer, max_tokens: int = 24):
    """Greedy completions of PROMPTS through the engine, all at once."""
    prompts = [tokenizer.encode(text, prepend=tokenizer.bos_id) for text in PROMPTS]
    engines: list[Engine] = []  # made at the first use and kept with its compiled programs

    def sample(params) -> list[str]:
        if not engines:
            capacity = max(map(len, prompts)) + max_tokens
            engines.append(Engine(config, params, tokenizer, slots=len(prompts), capacity=capacity))
        engine = engines[0]
        engine.params = params
        requests = [engine.submit(prompt, max_tokens, temperature=0.0) for prompt in prompts]
        while engine.live:
            engine.step()
        return [tokenizer.decode([*r.prompt[1:], *r.tokens]) for r in requests]

    return sample
