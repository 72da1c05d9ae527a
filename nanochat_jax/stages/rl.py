"""Reinforcement learning: the model's own completions, weighted by how much better than their average they are."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.evals.chat_eval import evaluate_generative, longest_prompt
from nanochat_jax.evals.samples import ANSWER_TOKENS, chat_prompts, greedy_sampler
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.loss import token_statistics
from nanochat_jax.parallel import multihost, sharding
from nanochat_jax.planner.plan import PlanError
from nanochat_jax.runs import checkpoint
from nanochat_jax.stages import mixtures, rollouts
from nanochat_jax.stages.batch_size import with_batch_size
from nanochat_jax.stages.pipeline import child_run, open_devices, open_parent, open_run, train
from nanochat_jax.stages.settings import DEMO_ROWS, ChatStageSettings
from nanochat_jax.training.job import Evaluation, Outcome, Parent, Rollout, TrainJob, of_recipe
from nanochat_jax.training.schedules import linear_to_zero
from nanochat_jax.utils.flags import flag
from tasks.task import Task

PARENTS = ("sft", "mid")
ROWS = 8  # per device and micro-step, where nothing says how many fit
AUTO_SLOTS, SLOTS = 0, 64
TRANSCRIPTS = 2  # questions a step whose best and worst completions are kept


@dataclass(frozen=True)
class RlSettings(ChatStageSettings):
    """Reinforcement learning: rollouts, loss, evaluation."""

    examples_per_step: int = flag(16, "questions per optimizer step")
    num_samples: int = flag(16, "completions sampled per question")
    max_new_tokens: int = flag(256, "the longest completion, in tokens")
    temperature: float = flag(1.0, "of the sampled completions")
    top_k: int = flag(50, "sample among the k most likely tokens, 0 = all")
    slots: int = flag(
        AUTO_SLOTS,
        f"completions decoded side by side, over all devices; auto: {SLOTS}, on GPUs as many on each",
        words={"auto": AUTO_SLOTS},
        free=True,
    )
    train_stop_token: bool = flag(True, "also train on when to stop (the reference does not)")
    clip: float = flag(0.0, "clip the trainer-to-sampler ratio to 1 +- this (PPO); 0: off, as the reference")
    kl: float = flag(0.0, "penalty for leaving the starting model, per nat; 0: off, as the reference")
    eval_examples: int = flag(400, "questions per evaluation", free=True)
    eval_samples: int = flag(8, "completions per question in an evaluation: the largest k of pass@k", free=True)


DEFAULTS = RlSettings(init_lr_frac=0.05, grad_clip=0.0, eval_every=60, sample_every=0, save_every=60)  # the reference's
DEMO = dataclasses.replace(
    DEFAULTS,
    demo=True,
    num_iterations=30,
    examples_per_step=8,
    num_samples=8,
    max_new_tokens=64,
    slots=32,
    init_lr_frac=0.1,
    eval_every=15,
    eval_examples=100,
    eval_samples=4,
    save_every=10,
)


def defaults(demo: bool, recorded: Mapping[str, Any]) -> RlSettings:
    """Those of the modern recipe: the learning rates of v1, which the reference does not inherit here, no decay."""
    v1 = DEMO if demo else DEFAULTS
    rates = {name: getattr(v1, name) for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay")}
    return dataclasses.replace(of_recipe(v1, "modern"), **rates)


def run(settings: RlSettings) -> Outcome:
    """Trains one model by reinforcement, or resumes its run."""
    mesh = open_devices(settings, decodes=True)
    parent = open_parent(settings, "rl", PARENTS)
    _check(settings, sharding.row_shards(mesh))
    with checkpoint.exclusive(child_run(settings, parent, "rl")) as folder:
        return _train(settings, folder, parent, mesh)


def _check(settings: RlSettings, n_devices: int) -> None:
    size = settings.device_batch_size or 1
    rows = settings.examples_per_step * settings.num_samples
    if settings.num_samples < 2:
        raise PlanError(f"--num_samples={settings.num_samples}: an advantage needs at least 2 completions per question")
    if rows % (size * n_devices):
        raise PlanError(
            f"{settings.examples_per_step} questions x {settings.num_samples} completions = {rows} rows are no "
            f"multiple of --device_batch_size={size} x {n_devices} devices; use a divisor of {rows}"
        )


def _slots(settings: RlSettings) -> int:
    if settings.slots != AUTO_SLOTS:
        return settings.slots
    devices = 1 if jax.default_backend() == "cpu" else jax.local_device_count()
    return min(SLOTS * devices, max(SLOTS, settings.examples_per_step * settings.num_samples))


def _train(settings: RlSettings, folder: Path, parent: Parent, mesh: Mesh) -> Outcome:
    # 1. the questions, the number of steps, the length of a row
    tokenizer = parent.tokenizer
    task, val = mixtures.rl(settings)
    steps = settings.num_iterations
    if steps <= 0:
        steps = max(1, len(task) // settings.examples_per_step * settings.num_epochs)
    asked = min(len(task), steps * settings.examples_per_step)  # not all of them: there may be a hundred thousand
    longest = max(longest_prompt(tokenizer, task, asked), longest_prompt(tokenizer, val, settings.eval_examples))
    T = -(-(longest + settings.max_new_tokens) // 64) * 64
    print(
        f"{steps:,} steps of {settings.examples_per_step} questions x {settings.num_samples} completions "
        f"({len(task):,} questions; rows of {T} tokens); held out: {len(val):,} questions"
    )
    # 2. the job, without its rollouts
    job = TrainJob(
        stage="rl",
        settings=settings,
        run=folder,
        tokenizer=tokenizer,
        config=dataclasses.replace(parent.config, remat=settings.remat),
        mesh=mesh,
        hyper=settings.hyper(momentum=0.95, momentum_warmup=0, momentum_final=None),
        schedule=linear_to_zero(steps),
        num_iterations=steps,
        rows_per_step=settings.examples_per_step * settings.num_samples,
        sequence_len=T,
        sampled=(-(-_slots(settings) // jax.local_device_count()), T),
        usual_rows=DEMO_ROWS if settings.demo else ROWS,
        held_out=False,
        normalize=False,  # advantages bring their own denominator
        parent=parent,
        model_name=parent.model_name,  # there are no conversations that could teach another
        identity={
            "task": task.fingerprint(),
            "parent": [parent.run, parent.step],
            "model_name": parent.model_name,
        },
    )

    # 3. with a number of rows: rollouts, training
    def attempt(job: TrainJob) -> Outcome:
        sampler = _Sampler(job, settings, task)
        open_run(job)
        return train(
            dataclasses.replace(
                job,
                rollout=sampler.rollout,
                evaluations=(Evaluation(lambda params: sampler.evaluate(params, val), settings.eval_every),),
                sample=greedy_sampler(job.config, tokenizer, chat_prompts(tokenizer), ANSWER_TOKENS),
            )
        )

    return with_batch_size(job, attempt)


class _Sampler:
    """Makes the batches of a run, with one engine whose compiled programs are kept."""

    def __init__(self, job: TrainJob, settings: RlSettings, task: Task):
        self.settings, self.task, self.T = settings, task, job.sequence_len
        self.config, self.tokenizer = job.config, job.tokenizer
        self._micro = job.settings.device_batch_size * sharding.row_shards(job.mesh)
        self._mesh, self._rows = multihost.local_mesh(job.mesh), job.settings.device_batch_size
        self._devices = list(self._mesh.devices.flat)  # which share the rollouts
        self._engine: Engine | None = None
        self._statistics = _statistics_fn(job.config, self._mesh)
        self._reference = None
        if job.parent and settings.kl:
            whole = sharding.named(self._mesh, sharding.replicated_spec())
            self._reference = jax.device_put(job.parent.params(), whole)

    def engine(self, params) -> Engine:
        if self._engine is None:
            s = self.settings
            self._engine = Engine(
                self.config, params, self.tokenizer, slots=_slots(s), capacity=self.T, steps_per_call=16,
                devices=self._devices, wait_for_tools=True,
            )  # fmt: skip
        self._engine.params = params
        return self._engine

    def evaluate(self, params, val) -> dict[str, float]:
        """pass@k on held-out questions, sampled as in training, with their intervals (pass@k_low, pass@k_high)."""
        s = self.settings
        result = evaluate_generative(
            self.engine(params),
            self.tokenizer,
            val,
            num_samples=s.eval_samples,
            max_new_tokens=s.max_new_tokens,
            temperature=s.temperature,
            top_k=s.top_k,
            max_problems=s.eval_examples,
        )
        numbers = {f"pass@{k}": value for k, value in result["pass_at_k"].items()}
        for k, (low, high) in result["pass_at_k_interval"].items():
            numbers |= {f"pass@{k}_low": low, f"pass@{k}_high": high}
        return numbers

    def rollout(self, params, step: int) -> Rollout:
        """The batch of a step: a pure function of the parameters and the step."""
        s = self.settings
        first = step * s.examples_per_step
        groups = rollouts.collect(
            self.engine(params),
            self.tokenizer,
            self.task,
            [(first + i) % len(self.task) for i in range(s.examples_per_step)],
            num_samples=s.num_samples,
            params=SamplingParams(s.max_new_tokens, s.temperature, s.top_k, seed=s.seed + step),
        )
        rewards = np.array([[one.reward for one in group] for group in groups], np.float32)
        completions = [one.completion for group in groups for one in group]
        pad = self.tokenizer.encode_special("<|assistant_end|>")
        packed = rollouts.pack(completions, self.T, pad, s.train_stop_token)
        # the trainer's own view: of all rows where the loss needs it, else of one completion of every question
        rows = np.arange(0, len(completions), 1 if s.clip or s.kl else s.num_samples)
        now, entropy = self._policy(params, packed, rows)
        reference = self._policy(self._reference, packed, rows)[0] if s.kl else None
        weight = rollouts.weights(
            packed, rollouts.advantages(rewards).ravel(), now=now, reference=reference, clip=s.clip, kl=s.kl
        )
        shape = (-1, self._micro, self.T)
        seen = packed.mask[rows]
        counted = max(1.0, float(seen.sum()))
        numbers = {
            "reward": float(rewards.mean()),
            "solved_sometimes": float(((rewards.max(1) > 0) & (rewards.min(1) < rewards.max(1))).mean()),
            "completion_length": float(np.mean([len(c.tokens) for c in completions])),
            "unfinished": float(np.mean([c.finish_reason != "end" for c in completions])),
            "entropy": float(entropy.sum() / counted),
            "logprob_difference": float(np.abs((now - packed.logprobs[rows]) * seen).sum() / counted),
        }
        return Rollout(
            (packed.inputs.reshape(shape), packed.targets.reshape(shape), weight.reshape(shape)),
            numbers,
            _transcripts(groups[:TRANSCRIPTS], self.tokenizer),
        )

    def _policy(self, params, packed: rollouts.Packed, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities and entropies (len(rows), T) of the trainer's forward pass over these rows."""
        devices = self._mesh.size
        micro = min(self._rows, -(-len(rows) // devices)) * devices
        whole = np.resize(rows, -(-len(rows) // micro) * micro)  # the last micro-batch is filled up
        parts = [
            self._statistics(params, packed.inputs[some], packed.targets[some]) for some in whole.reshape(-1, micro)
        ]
        now, entropy = (np.concatenate([np.asarray(part[k]) for part in parts])[: len(rows)] for k in (0, 1))
        return now, entropy


def _statistics_fn(config: GPTConfig, mesh: Mesh):
    """A jitted `token_statistics` of (params, inputs, targets), with full parameters, whose rows are sharded over all
    devices of the mesh."""
    full, rows = sharding.replicated_spec(), sharding.batch_spec(2)

    def local(params, inputs, targets):
        return token_statistics(config, params, inputs, targets)

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(full, rows, rows), out_specs=rows, check_vma=False))


def _transcripts(groups: list[list[rollouts.RewardedCompletion]], tokenizer) -> list[dict]:
    """The best and the worst completion of each question, as text."""
    saved = []
    for group in groups:
        ordered = sorted(group, key=lambda one: one.reward)
        for question, c, reward in [ordered[-1], *(ordered[:1] if ordered[0].reward < ordered[-1].reward else [])]:
            prompt = tokenizer.decode(c.prompt[1:])
            saved.append({"question": question, "prompt": prompt, "completion": c.text, "reward": reward})
    return saved
