"""Pretraining: its flags, its rows, its evaluation."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanochat_jax.data.build_rows import PACKINGS, build_rows, packing_of
from nanochat_jax.data.loader import RowLoader
from nanochat_jax.data.row_store import RowSet
from nanochat_jax.data.sources import TextSource, text_source
from nanochat_jax.evals.samples import TEXT_TOKENS, TEXTS, greedy_sampler, text_prompts
from nanochat_jax.model.config import MODERN, GPTConfig
from nanochat_jax.parallel import sharding
from nanochat_jax.planner import plan as planning
from nanochat_jax.planner.plan import DEPTH, SEQUENCE_LEN, TOKENS_PER_PARAMETER, BasePlan, PlanError
from nanochat_jax.runs import checkpoint
from nanochat_jax.stages.batch_size import with_batch_size
from nanochat_jax.stages.pipeline import held_out, micro_batches, open_devices, open_run, train
from nanochat_jax.stages.settings import DEMO_ROWS, StageSettings
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.training.job import Evaluation, Outcome, TrainJob, of_recipe
from nanochat_jax.training.optim import MUON_PARTS, OptimHyper, lr_schedule
from nanochat_jax.utils.flags import flag
from nanochat_jax.utils.progress import RowsProgress

# Parts of the modern recipe that --off can leave out: of the model, of Muon, of the data.
PARTS = (*MODERN, *MUON_PARTS, "best_fit")
_BEST_FIT_TEXT = 1.6  # so much more of it is needed where a third is cropped


@dataclass(frozen=True)
class BaseSettings(StageSettings):
    """Pretraining: model, horizon, schedule, text."""

    depth: int = flag(DEPTH, "the one dial: layers; width is 64 x depth, everything else follows")
    max_seq_len: int = flag(SEQUENCE_LEN, "context length in tokens")
    target_flops: float = flag(-1.0, "stop at about this many training FLOPs; -1: not used", decides="num_iterations")
    target_param_data_ratio: float = flag(
        TOKENS_PER_PARAMETER, "training tokens per parameter", decides="num_iterations"
    )
    off: str = flag("", f"modern recipe: parts left out, comma-separated ({', '.join(PARTS)})")
    warmup_ratio: float = flag(OptimHyper.warmup_ratio, "share of the steps with a rising learning rate")
    warmup_steps: int = flag(OptimHyper.warmup_steps, "the same as a number of steps; 0: warmup_ratio decides")
    warmdown_ratio: float = flag(OptimHyper.warmdown_ratio, "share of the steps with a falling learning rate")
    final_lr_frac: float = flag(OptimHyper.final_lr_frac, "learning rate at the very end, as a share")
    scale_rates: bool = flag(
        True, "multiply learning rates and weight decay as the batch and the horizon want it (modern recipe)"
    )
    every_packing: bool = flag(
        False, "at the end, measure bits per byte on held-out rows of every packing, as miniseries do"
    )
    data: str = flag(
        "", "file or folder of your own text (parquet, txt, md, jsonl); default: the downloaded shards", path=True,
        decides="rows",
    )  # fmt: skip
    text_column: str = flag("text", "name of the text column or key in parquet and jsonl files", decides="rows")


DEFAULTS = BaseSettings()
DEMO = dataclasses.replace(
    DEFAULTS,
    demo=True,
    depth=4,
    max_seq_len=256,
    num_iterations=190,
    total_batch_size=4096,
    warmdown_ratio=0.4,
    eval_every=100,
    eval_tokens=65536,
    sample_every=100,
    save_every=50,
)


def defaults(demo: bool, recorded: Mapping[str, Any]) -> BaseSettings:
    """Those of the modern recipe."""
    values = {name: value for name, value in planning.DEFAULTS["modern"].items() if name != "vocab_size"}
    if demo:
        return dataclasses.replace(of_recipe(DEMO, "modern"), scale_rates=False)
    return dataclasses.replace(of_recipe(DEFAULTS, "modern"), eval_tokens=80 * planning.TOTAL_BATCH_SIZE, **values)


def run(settings: BaseSettings) -> Outcome:
    """Pretrains one model, or resumes its run. Prints as it goes."""
    # 1. devices, tokenizer, the plan of the run
    mesh = open_devices(settings)
    tokenizer = Tokenizer.load()
    plan = plan_of(settings, tokenizer.vocab_size, sharding.row_shards(mesh))
    settings = dataclasses.replace(settings, total_batch_size=plan.total_batch_size)  # what was derived is recorded
    config = plan.config
    if config.smear:
        config = dataclasses.replace(config, bos_id=tokenizer.bos_id)
    # 2. the job, without its data: what decides how many rows fit on a device
    job = TrainJob(
        stage="base",
        settings=settings,
        run=checkpoint.run_dir(settings.run_name or f"base-d{settings.depth}"),
        tokenizer=tokenizer,
        config=dataclasses.replace(config, remat=settings.remat),
        mesh=mesh,
        hyper=plan.hyper,
        schedule=lr_schedule(plan.hyper, plan.num_iterations),
        num_iterations=plan.num_iterations,
        rows_per_step=plan.total_batch_size // plan.max_seq_len,
        sequence_len=plan.max_seq_len,
        sampled=(len(TEXTS), 64),
        usual_rows=DEMO_ROWS if settings.demo else 32,
    )

    # 3. with a number of rows: text, rows, training
    def attempt(job: TrainJob) -> Outcome:
        print(plan.with_rows(job.settings.device_batch_size).describe())
        tokens = plan.total_tokens * (_BEST_FIT_TEXT if packing_of(settings.recipe, settings.off) == "best_fit" else 1)
        source = text_source(settings.data, settings.demo, settings.text_column, tokens, settings.recipe)
        with checkpoint.exclusive(job.run):
            return _train(job, source, settings)

    return with_batch_size(job, attempt)


def plan_of(settings: BaseSettings, vocab_size: int, devices: int) -> BasePlan:
    """The plan that the flags describe, for so many devices with rows of their own. Raises PlanError."""
    off = _off(settings)
    hyper = settings.hyper(**{part: False for part in off if part in MUON_PARTS})
    plan = BasePlan.derive(
        depth=settings.depth,
        vocab_size=vocab_size,
        max_seq_len=settings.max_seq_len,
        device_batch_size=settings.device_batch_size or 1,
        total_batch_size=settings.total_batch_size,
        num_iterations=settings.num_iterations,
        target_flops=settings.target_flops,
        target_param_data_ratio=settings.target_param_data_ratio,
        devices=devices,
        tensor=settings.tensor,
        hyper=hyper,
        scale_rates=settings.scale_rates,
    )
    neutral = {f.name: f.default for f in dataclasses.fields(GPTConfig) if f.name in off}
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, **neutral))


def _off(settings: BaseSettings) -> set[str]:
    off = {name.strip() for name in settings.off.split(",") if name.strip()}
    if off and settings.recipe != "modern":
        raise PlanError("--off leaves parts out of the modern recipe: it needs --recipe=modern")
    if unknown := sorted(off - set(PARTS)):
        raise PlanError(f"--off={','.join(unknown)}: no part of the modern recipe, which are {', '.join(PARTS)}")
    return off


def _train(job: TrainJob, source: TextSource, settings: BaseSettings) -> Outcome:
    """Everything that happens inside the run's folder, which this process has locked."""
    open_run(job)
    train_rows, val_rows = make_rows(source, job, settings.eval_tokens, packing_of(settings.recipe, settings.off))
    loader = RowLoader(train_rows, job.rows_per_step, job.settings.seed)
    bits = held_out(job.config, val_rows, job.settings.device_batch_size, job.tokenizer, job.mesh)
    evaluations = [Evaluation(lambda params: {"val_bpb": bits(params)["val_bpb"]}, job.settings.eval_every)]
    if settings.every_packing:
        evaluations.append(Evaluation(_every_packing(source, job, settings.eval_tokens), at_start=False))
    job = dataclasses.replace(
        job,
        identity={"rows": train_rows.key},  # content decides, not where it lies
        batches=lambda step: micro_batches(loader, step, job.accumulation, job.mesh),
        evaluations=tuple(evaluations),
        sample=greedy_sampler(job.config, job.tokenizer, text_prompts(job.tokenizer), TEXT_TOKENS),
    )
    return train(job)


def _every_packing(source: TextSource, job: TrainJob, eval_tokens: int):
    """An evaluation: {"stream_bpb": bits per byte on held-out rows of that packing, "best_fit_bpb": ...}."""
    T = job.sequence_len
    bits = {}
    for packing in PACKINGS:
        rows = build_rows(source.val, job.tokenizer, T, split="val", packing=packing, max_rows=-(-eval_tokens // T))
        bits[packing] = held_out(job.config, rows, job.settings.device_batch_size, job.tokenizer, job.mesh)
    return lambda params: {f"{packing}_bpb": measure(params)["val_bpb"] for packing, measure in bits.items()}


def make_rows(source: TextSource, job: TrainJob, eval_tokens: int, packing: str = "stream") -> tuple[RowSet, RowSet]:
    """Training rows for the full horizon (or all there are: the run then passes over them again) and held-out rows.

    Text that is still to be downloaded is tokenized shard by shard as it comes.
    """
    tokenizer, T = job.tokenizer, job.sequence_len
    needed = job.num_iterations * job.rows_per_step
    most = -(-eval_tokens // T)
    with RowsProgress("held-out rows", most) as progress:
        how: Any = dict(packing=packing, progress=progress)
        val = build_rows(source.val, tokenizer, T, split="val", max_rows=most, **how)
    with RowsProgress("training rows", needed) as progress:
        how["progress"] = progress
        train = build_rows(source.train, tokenizer, T, max_rows=needed, **how)
    epochs = needed / len(train)
    again = f"; the run passes over them {epochs:.1f} times" if epochs > 1 else ""
    cropped = train.manifest.get("cropped", 0) / max(1, train.manifest.get("stream_tokens", 1))
    lost = f"; {100 * cropped:.1f}% of the text's tokens cropped" if packing == "best_fit" else ""
    print(f"data: {source.description}: {len(train):,} training rows of {T} tokens, {len(val):,} held out{lost}{again}")
    return train, val
