"""Midtraining and finetuning: a parent's model is trained on rows made of conversations."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from nanochat_jax.data.conversation_rows import Conversations, build_conversation_rows
from nanochat_jax.data.loader import RowLoader
from nanochat_jax.data.row_store import RowSet
from nanochat_jax.evals.samples import ANSWER_TOKENS, chat_prompts, greedy_sampler
from nanochat_jax.parallel import sharding
from nanochat_jax.planner.plan import check_batch
from nanochat_jax.stages.batch_size import with_batch_size
from nanochat_jax.stages.pipeline import held_out, micro_batches, open_run, train
from nanochat_jax.stages.settings import DEMO_ROWS, ChatStageSettings
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.training.job import Evaluation, Outcome, Parent, TrainJob
from nanochat_jax.training.optim import OptimHyper
from nanochat_jax.training.schedules import Schedule
from nanochat_jax.utils.progress import RowsProgress

Rows = tuple[RowSet, RowSet]  # for training and held out


def make_rows(
    settings: ChatStageSettings,
    parent: Parent,
    mesh: Mesh,
    conversations: tuple[Conversations, Conversations],
    packing: str,
) -> Rows:
    """Rows of (training, held-out) conversations; packing: "stream" or "best_fit". Raises PlanError for a batch that
    cannot be divided over the devices."""
    T = settings.max_seq_len or parent.config.sequence_len
    check_batch(settings.total_batch_size, settings.device_batch_size or 1, T, sharding.row_shards(mesh))
    wanted = settings.num_iterations * (settings.total_batch_size // T) if settings.num_iterations > 0 else None
    train, val = conversations
    return (
        _rows("train", train, parent.tokenizer, T, packing, wanted),
        _rows("val", val, parent.tokenizer, T, packing, -(-settings.eval_tokens // T)),
    )


def _rows(split: str, conversations: Conversations, tokenizer: Tokenizer, T: int, packing: str, most: int | None):
    name = {"train": "training rows", "val": "held-out rows"}[split]
    with RowsProgress(name, most) as progress:
        rows = build_conversation_rows(
            conversations, tokenizer, T, packing=packing, split=split, max_rows=most, progress=progress
        )
    facts = rows.manifest
    kinds = {"skipped": "left out", "truncated": "cut to a row"}
    problems = [f"{facts[k]:,} {what}" for k, what in kinds.items() if facts.get(k)]
    print(
        f"{name}: {len(rows):,} of {T} tokens from {facts['conversations']:,} conversations"
        + (f" ({', '.join(problems)})" if problems else "")
    )
    return rows


def make_job(
    stage: str,
    settings: ChatStageSettings,
    run: Path,
    parent: Parent,
    mesh: Mesh,
    rows: Rows,
    hyper: OptimHyper,
    schedule: Callable[[int], Schedule],
    usual_rows: int = 32,
) -> TrainJob:
    """The job of a stage, all but its data; schedule: number of steps -> multiplier."""
    T = settings.max_seq_len or parent.config.sequence_len
    rows_per_step = settings.total_batch_size // T
    steps = settings.num_iterations
    if steps <= 0:
        steps = max(1, settings.num_epochs * len(rows[0]) // rows_per_step)
    prompts = chat_prompts(parent.tokenizer)
    return TrainJob(
        stage=stage,
        settings=settings,
        run=run,
        tokenizer=parent.tokenizer,
        config=dataclasses.replace(parent.config, remat=settings.remat),
        mesh=mesh,
        hyper=hyper,
        schedule=schedule(steps),
        num_iterations=steps,
        rows_per_step=rows_per_step,
        sequence_len=T,
        sampled=(len(prompts), max(map(len, prompts)) + ANSWER_TOKENS),
        usual_rows=DEMO_ROWS if settings.demo else usual_rows,
        parent=parent,
        model_name=settings.model_name or parent.model_name,
        identity={"rows": rows[0].key, "parent": [parent.run, parent.step]},
    )


def train_on(job: TrainJob, rows: Rows, evaluations: tuple[Evaluation, ...] = (), *, shuffle: bool = False) -> Outcome:
    """Trains a job on rows; `evaluations` come beside the held-out loss. shuffle: the rows anew in every pass, by the
    job's seed; else in their order, which is that of a mixture, shuffled once (as in the reference)."""
    train_rows, val_rows = rows
    epochs = job.num_iterations * job.rows_per_step / len(train_rows)
    loader = RowLoader(train_rows, job.rows_per_step, job.settings.seed, shuffle)

    def attempt(job: TrainJob) -> Outcome:
        size, shards = job.settings.device_batch_size, sharding.row_shards(job.mesh)
        print(
            f"{job.num_iterations:,} steps of {job.tokens_per_step:,} tokens ({size} rows x {job.sequence_len} x "
            f"{shards} devices x {job.accumulation} accumulated): {epochs:.2f} passes over the rows"
        )
        open_run(job)
        loss = held_out(job.config, val_rows, size, job.tokenizer, job.mesh)
        return train(
            dataclasses.replace(
                job,
                batches=lambda step: micro_batches(loader, step, job.accumulation, job.mesh),
                evaluations=(Evaluation(loss, job.settings.eval_every), *evaluations),
                sample=greedy_sampler(job.config, job.tokenizer, chat_prompts(job.tokenizer), ANSWER_TOKENS),
            )
        )

    return with_batch_size(job, attempt)
