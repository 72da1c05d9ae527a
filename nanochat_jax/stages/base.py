"""Pretraining: its flags, its rows, its evaluation. The loop is `train.fit`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nanochat_jax.data.build_rows import build_rows
from nanochat_jax.data.loader import RowLoader
from nanochat_jax.data.row_store import RowSet
from nanochat_jax.data.sources import TextSource, text_source
from nanochat_jax.evals.samples import TEXT_TOKENS, TEXTS, greedy_sampler, text_prompts
from nanochat_jax.parallel import sharding
from nanochat_jax.planner.plan import BasePlan
from nanochat_jax.runs import checkpoint
from nanochat_jax.stages.batch_size import Shapes, with_batch_size
from nanochat_jax.stages.pipeline import (
    Recipe,
    StageSettings,
    batch_flag,
    held_out,
    micro_batches,
    open_devices,
    open_run,
    train,
)
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.training.loop import Evaluation, Outcome
from nanochat_jax.training.optim import lr_schedule
from nanochat_jax.utils.flags import flag
from nanochat_jax.utils.progress import RowsProgress


@dataclass(frozen=True)
class BaseSettings(StageSettings):
    """Flags of --stage=base."""

    run_name: str = flag("", "name of the run's folder; default base-d<depth>")
    depth: int = flag(20, "the one dial: layers; width is 64 x depth, everything else follows")
    max_seq_len: int = flag(2048, "context length in tokens")
    num_iterations: int = flag(-1, "optimizer steps; -1: from target_flops or target_param_data_ratio")
    target_flops: float = flag(-1.0, "stop at about this many training FLOPs; -1: not used")
    target_param_data_ratio: float = flag(20.0, "training tokens per parameter")
    warmup_ratio: float = flag(0.0, "share of the steps with a rising learning rate")
    warmdown_ratio: float = flag(0.2, "share of the steps with a falling learning rate")
    final_lr_frac: float = flag(0.0, "learning rate at the very end, as a share")
    data: str = flag("", "file or folder of your own text (parquet, txt, md, jsonl); default: the downloaded shards")
    text_column: str = flag("text", "name of the text column or key in parquet and jsonl files")


@dataclass(frozen=True)
class DemoSettings(BaseSettings):
    """The same flags with defaults for the embedded demo data on two CPU cores."""

    ROWS: ClassVar[int] = 16

    demo: bool = flag(True, "train on the embedded demo data with these small defaults")
    depth: int = flag(4, "the one dial: layers; width is 64 x depth, everything else follows")
    max_seq_len: int = flag(256, "context length in tokens")
    num_iterations: int = flag(190, "optimizer steps")
    device_batch_size: int = batch_flag(ROWS)
    total_batch_size: int = flag(4096, "tokens per optimizer step, reached by accumulation")
    warmdown_ratio: float = flag(0.4, "share of the steps with a falling learning rate")
    eval_every: int = flag(100, "steps between evaluations; 0: only at the end")
    eval_tokens: int = flag(65536, "tokens of held-out text per evaluation")
    sample_every: int = flag(100, "steps between samples; 0: only at the end")
    save_every: int = flag(50, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)")


def run(settings: BaseSettings) -> Outcome:
    """Pretrains, or goes on pretraining, one model. Returns what `fit` returns; prints as it goes."""
    mesh = open_devices(settings)
    tokenizer = Tokenizer.load()

    def plan_of(settings: BaseSettings) -> BasePlan:
        return BasePlan.from_settings(settings, vocab_size=tokenizer.vocab_size, devices=sharding.row_shards(mesh))

    plan = plan_of(dataclasses.replace(settings, device_batch_size=settings.device_batch_size or 1))
    config = dataclasses.replace(plan.config, remat=settings.remat)

    def attempt(settings: BaseSettings) -> Outcome:
        plan = plan_of(settings)
        print(plan.describe())
        source = text_source(settings.data, settings.demo, settings.text_column, plan.total_tokens)
        with checkpoint.exclusive(checkpoint.run_dir(settings.run_name or f"base-d{settings.depth}")) as folder:
            return _train(settings, folder, tokenizer, plan, config, source, mesh)

    shapes = Shapes(config, plan.total_batch_size // plan.max_seq_len, plan.max_seq_len, sampled=(len(TEXTS), 64))
    return with_batch_size(settings, mesh, shapes, lr_schedule(plan.hyper, plan.num_iterations), attempt)


def _train(settings: BaseSettings, folder: Path, tokenizer: Tokenizer, plan: BasePlan, config, source, mesh) -> Outcome:
    """Everything that happens inside the run's folder, which nobody else uses meanwhile."""
    open_run(folder, settings, tokenizer)
    train_rows, val_rows = make_rows(source, tokenizer, plan, settings.eval_tokens)
    rows_per_step = plan.total_batch_size // plan.max_seq_len
    bits = held_out(config, val_rows, settings.device_batch_size, tokenizer, mesh)
    recipe = Recipe(
        stage="base",
        settings=settings,
        tokenizer=tokenizer,
        config=config,
        num_iterations=plan.num_iterations,
        schedule=lr_schedule(plan.hyper, plan.num_iterations),
        tokens_per_step=plan.total_batch_size,
        # content decides, not where it lies; the horizon's flags have decided num_iterations
        identity={"rows": train_rows.key, **dict.fromkeys(_DECIDED)},
        batches=lambda step: micro_batches(
            RowLoader(train_rows, rows_per_step, settings.seed), step, plan.grad_accum, mesh
        ),
        evaluations=(Evaluation(lambda params: {"val_bpb": bits(params)["val_bpb"]}, settings.eval_every),),
        sample=greedy_sampler(config, tokenizer, text_prompts(tokenizer), TEXT_TOKENS),
    )
    return train(recipe, folder, mesh)


_DECIDED = ("target_flops", "target_param_data_ratio", "data", "text_column")


def make_rows(source: TextSource, tokenizer: Tokenizer, plan: BasePlan, eval_tokens: int) -> tuple[RowSet, RowSet]:
    """Training rows for the full horizon (or all there are: the run then passes over them again) and held-out rows.

    Text that is still to be downloaded is tokenized shard by shard as it comes.
    """
    T = plan.max_seq_len
    needed = plan.num_iterations * (plan.total_batch_size // T)
    with RowsProgress("held-out rows", -(-eval_tokens // T)) as progress:
        val = build_rows(source.val, tokenizer, T, split="val", max_tokens=eval_tokens, progress=progress)
    with RowsProgress("training rows", needed) as progress:
        train = build_rows(source.train, tokenizer, T, max_rows=needed, progress=progress)
    epochs = needed / len(train)
    again = f"; the run passes over them {epochs:.1f} times" if epochs > 1 else ""
    print(f"data: {source.description}: {len(train):,} training rows of {T} tokens, {len(val):,} held out{again}")
    return train, val
