"""Midtraining and finetuning: a parent's model goes on learning, from rows made of conversations."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.data.conversation_rows import Conversations, build_conversation_rows
from nanochat_jax.data.loader import RowLoader
from nanochat_jax.data.row_store import RowSet
from nanochat_jax.evals.samples import ANSWER_TOKENS, chat_prompts, greedy_sampler
from nanochat_jax.parallel import multihost, sharding
from nanochat_jax.planner.plan import check_batch
from nanochat_jax.runs import checkpoint
from nanochat_jax.stages.batch_size import Shapes, with_batch_size
from nanochat_jax.stages.pipeline import (
    MODEL_NAME,
    Parent,
    Recipe,
    StageSettings,
    child_name,
    find_parent,
    held_out,
    micro_batches,
    open_devices,
    open_run,
    train,
)
from nanochat_jax.training.loop import Evaluation, Outcome
from nanochat_jax.training.schedules import Schedule
from nanochat_jax.utils.flags import flag
from nanochat_jax.utils.progress import RowsProgress


@dataclass(frozen=True)
class ChatStageSettings(StageSettings):
    """Flags of the stages that learn from conversations."""

    run_name: str = flag("", "name of the run's folder; default: the parent's, with this stage at its end")
    source: str = flag("", "run to start from; default: the newest of the stage before")
    source_step: int | None = flag(None, "checkpoint of the source to start from; default: its last")
    max_seq_len: int = flag(0, "tokens per row; 0: the parent's context length")
    num_iterations: int = flag(-1, "optimizer steps; -1: from num_epochs")
    num_epochs: int = flag(1, "passes over the conversations")
    init_lr_frac: float = flag(1.0, "all learning rates as a share of pretraining's")
    task_data: Path | None = flag(None, "folder with the data sets, instead of downloading them (see tasks/hub.py)")
    model_name: str = flag(
        "", f"the name the model learns to give when asked who it is; default: the source's, at first {MODEL_NAME}"
    )


@dataclass(frozen=True)
class Lesson:
    """What a stage is taught: conversations for training and held out, and how rows are made of them."""

    stage: str
    parents: tuple[str, ...]
    packing: str  # "stream" or "best_fit"
    train: Conversations
    val: Conversations
    schedule: Callable[[int], Schedule]  # number of steps -> multiplier
    evaluations: Callable[[Parent, Any], tuple[Evaluation, ...]] = lambda parent, mesh: ()
    hyper: dict[str, Any] = dataclasses.field(default_factory=dict)  # optimizer settings that are no flags


def run(settings: ChatStageSettings, stage: str, parents: tuple[str, ...], lesson: Callable[[Parent], Lesson]):
    """Trains, or goes on training, one stage. `lesson` is asked for the conversations once the parent is known."""
    mesh = open_devices(settings)
    parent = open_parent(settings, stage, parents)
    with checkpoint.exclusive(checkpoint.run_dir(settings.run_name or child_name(parent.run, stage))) as folder:
        return _train(settings, folder, parent, lesson(parent), mesh)


def open_parent(settings: ChatStageSettings, stage: str, parents: tuple[str, ...]) -> Parent:
    """The parent that --source names, or the one an existing run had, or the newest of the stage before."""
    source, step = settings.source, settings.source_step
    if not source and settings.run_name and settings.resume:
        folder = checkpoint.run_dir(settings.run_name)
        if checkpoint.steps(folder):
            recorded = checkpoint.load_meta(folder).get("parent", {})
            source, step = recorded.get("run", ""), recorded.get("step")
    parent = find_parent(source, parents, step)
    print(f"{stage} starts from {parent.run}, step {parent.step} ({parent.stage})")
    return parent


def _train(settings: ChatStageSettings, folder: Path, parent: Parent, lesson: Lesson, mesh) -> Outcome:
    tokenizer, config = parent.tokenizer, dataclasses.replace(parent.config, remat=settings.remat)
    T = settings.max_seq_len or config.sequence_len
    shards = sharding.row_shards(mesh)
    check_batch(settings.total_batch_size, settings.device_batch_size or 1, T, shards)
    rows_per_step = settings.total_batch_size // T
    wanted = settings.num_iterations * rows_per_step if settings.num_iterations > 0 else None
    train_rows = _rows(lesson, "train", tokenizer, T, wanted)
    val_rows = _rows(lesson, "val", tokenizer, T, -(-settings.eval_tokens // T))
    steps = settings.num_iterations
    if steps <= 0:
        steps = max(1, settings.num_epochs * len(train_rows) // rows_per_step)
    epochs = steps * rows_per_step / len(train_rows)
    schedule = lesson.schedule(steps)

    def attempt(settings: ChatStageSettings) -> Outcome:
        rows = settings.device_batch_size
        check_batch(settings.total_batch_size, rows, T, shards)
        accumulation = rows_per_step // (rows * shards)
        print(
            f"{steps:,} steps of {settings.total_batch_size:,} tokens ({rows} rows x {T} x {shards} devices x "
            f"{accumulation} accumulated): {epochs:.2f} passes over the rows"
        )
        open_run(folder, settings, tokenizer)
        recipe = Recipe(
            stage=lesson.stage,
            settings=settings,
            tokenizer=tokenizer,
            config=config,
            num_iterations=steps,
            schedule=schedule,
            tokens_per_step=settings.total_batch_size,
            identity={"rows": train_rows.key, "parent": [parent.run, parent.step], **dict.fromkeys(_DECIDED)},
            # in the order of the conversations, which a mixture has shuffled (as the reference)
            batches=lambda step: micro_batches(
                RowLoader(train_rows, rows_per_step, shuffle=False), step, accumulation, mesh
            ),
            evaluations=(
                Evaluation(held_out(config, val_rows, rows, tokenizer, mesh), settings.eval_every),
                *lesson.evaluations(parent, multihost.local_mesh(mesh)),
            ),
            sample=greedy_sampler(config, tokenizer, prompts, ANSWER_TOKENS),
            parent=parent,
            hyper=lesson.hyper,
        )
        return train(recipe, folder, mesh)

    prompts = chat_prompts(tokenizer)
    shapes = Shapes(config, rows_per_step, T, sampled=(len(prompts), max(map(len, prompts)) + ANSWER_TOKENS))
    return with_batch_size(settings, mesh, shapes, schedule, attempt, hyper=lesson.hyper)


# Flags that have decided the rows or the number of steps, which are compared themselves.
_DECIDED = ("num_epochs", "task_data", "data", "metrics_every", "metrics_max_problems")


def _rows(lesson: Lesson, split: str, tokenizer, T: int, max_rows: int | None) -> RowSet:
    conversations = lesson.train if split == "train" else lesson.val
    name = {"train": "training rows", "val": "held-out rows"}[split]
    with RowsProgress(name, max_rows) as progress:
        rows = build_conversation_rows(
            conversations, tokenizer, T, packing=lesson.packing, split=split, max_rows=max_rows, progress=progress
        )
    facts = rows.manifest
    kinds = {"skipped": "left out", "truncated": "cut to a row"}
    problems = [f"{facts[k]:,} {what}" for k, what in kinds.items() if facts.get(k)]
    print(
        f"{name}: {len(rows):,} of {T} tokens from {facts['conversations']:,} conversations"
        + (f" ({', '.join(problems)})" if problems else "")
    )
    return rows
