"""Reinforcement learning: the model's own answers, weighted by how much better than its average they are."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

from nanochat_jax.evals.chat_eval import evaluate_generative, longest_prompt
from nanochat_jax.evals.samples import ANSWER_TOKENS, chat_prompts, greedy_sampler
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model.loss import token_statistics
from nanochat_jax.parallel import sharding
from nanochat_jax.planner.plan import PlanError
from nanochat_jax.runs import checkpoint
from nanochat_jax.stages import mixtures, rollouts
from nanochat_jax.stages.batch_size import Shapes, with_batch_size
from nanochat_jax.stages.pipeline import Parent, Recipe, batch_flag, child_name, open_devices, open_run, train
from nanochat_jax.stages.supervised import ChatStageSettings, open_parent
from nanochat_jax.training.loop import Evaluation, Outcome, Rollout
from nanochat_jax.training.schedules import linear_to_zero
from nanochat_jax.utils.flags import flag

PARENTS = ("sft", "mid")
TRANSCRIPTS = 2  # questions a step whose best and worst answers are kept


@dataclass(frozen=True)
class RlSettings(ChatStageSettings):
    """Flags of --stage=rl; defaults as the reference's."""

    ROWS: ClassVar[int] = 8

    num_iterations: int = flag(-1, "optimizer steps; -1: from num_epochs")
    examples_per_step: int = flag(16, "questions per optimizer step")
    num_samples: int = flag(16, "answers sampled per question")
    max_new_tokens: int = flag(256, "the longest answer, in tokens")
    temperature: float = flag(1.0, "of the sampled answers")
    top_k: int = flag(50, "sample among the k likeliest tokens, 0 = all")
    slots: int = flag(64, "answers decoded side by side, over all devices")
    train_stop_token: bool = flag(True, "also learn when to stop (the reference does not)")
    clip: float = flag(0.0, "clip the trainer-to-sampler ratio to 1 +- this (PPO); 0: off, as the reference")
    kl: float = flag(0.0, "penalty for leaving the starting model, per nat; 0: off, as the reference")
    device_batch_size: int = batch_flag(ROWS)
    init_lr_frac: float = flag(0.05, "all learning rates as a share of pretraining's")
    grad_clip: float = flag(0.0, "largest global gradient norm; 0: no clipping (as the reference)")
    eval_every: int = flag(60, "steps between evaluations of pass@k; 0: only at the end")
    eval_examples: int = flag(400, "questions per evaluation")
    eval_samples: int = flag(8, "answers per question in an evaluation: the largest k of pass@k")
    sample_every: int = flag(0, "steps between samples; 0: only at the end")
    save_every: int = flag(60, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)")


@dataclass(frozen=True)
class DemoRlSettings(RlSettings):
    """The same flags with defaults for the demo world on two CPU cores."""

    ROWS: ClassVar[int] = 16

    demo: bool = flag(True, "the embedded demo world's questions, with these small defaults")
    num_iterations: int = flag(30, "optimizer steps")
    examples_per_step: int = flag(8, "questions per optimizer step")
    num_samples: int = flag(8, "answers sampled per question")
    max_new_tokens: int = flag(64, "the longest answer, in tokens")
    slots: int = flag(32, "answers decoded side by side")
    device_batch_size: int = batch_flag(ROWS)
    init_lr_frac: float = flag(0.1, "all learning rates as a share of pretraining's")
    eval_every: int = flag(15, "steps between evaluations of pass@k; 0: only at the end")
    eval_examples: int = flag(100, "questions per evaluation")
    eval_samples: int = flag(4, "answers per question in an evaluation: the largest k of pass@k")
    save_every: int = flag(10, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)")


def run(settings: RlSettings) -> Outcome:
    """Trains, or goes on training, one model by reinforcement."""
    mesh = open_devices(settings)
    parent = open_parent(settings, "rl", PARENTS)
    _check(settings, sharding.row_shards(mesh))
    with checkpoint.exclusive(checkpoint.run_dir(settings.run_name or child_name(parent.run, "rl"))) as folder:
        return _train(settings, folder, parent, mesh)


def _check(settings: RlSettings, n_devices: int) -> None:
    rows, micro = settings.examples_per_step * settings.num_samples, (settings.device_batch_size or 1) * n_devices
    if settings.num_samples < 2:
        raise PlanError(f"--num_samples={settings.num_samples}: an advantage needs at least 2 answers per question")
    if rows % micro:
        raise PlanError(
            f"{settings.examples_per_step} questions x {settings.num_samples} answers = {rows} rows are no multiple of "
            f"--device_batch_size={settings.device_batch_size or 1} x {n_devices} devices; use a divisor of {rows}"
        )


def _train(settings: RlSettings, folder: Path, parent: Parent, mesh) -> Outcome:
    tokenizer, config = parent.tokenizer, dataclasses.replace(parent.config, remat=settings.remat)
    task, val = mixtures.rl(settings)
    steps = settings.num_iterations
    if steps <= 0:
        steps = max(1, len(task) // settings.examples_per_step * settings.num_epochs)
    asked = min(len(task), steps * settings.examples_per_step)  # not all of them: there may be a hundred thousand
    longest = max(longest_prompt(tokenizer, task, asked), longest_prompt(tokenizer, val, settings.eval_examples))
    T = -(-(longest + settings.max_new_tokens) // 64) * 64
    rows = settings.examples_per_step * settings.num_samples
    print(
        f"{steps:,} steps of {settings.examples_per_step} questions x {settings.num_samples} answers "
        f"({len(task):,} questions; rows of {T} tokens); held out: {len(val):,} questions"
    )
    schedule, prompts = linear_to_zero(steps), chat_prompts(tokenizer)
    hyper = {"momentum_warmup": 0}

    def attempt(settings: RlSettings) -> Outcome:
        _check(settings, sharding.row_shards(mesh))
        sampler = _Sampler(settings, config, parent, task, T, mesh)
        open_run(folder, settings, tokenizer)
        recipe = Recipe(
            stage="rl",
            settings=settings,
            tokenizer=tokenizer,
            config=config,
            num_iterations=steps,
            schedule=schedule,
            tokens_per_step=rows * T,
            identity={"task": task.fingerprint(), "parent": [parent.run, parent.step], **dict.fromkeys(_DECIDED)},
            rollout=sampler.rollout,
            evaluations=(Evaluation(lambda params: sampler.evaluate(params, val), settings.eval_every),),
            sample=greedy_sampler(config, tokenizer, prompts, ANSWER_TOKENS),
            parent=parent,
            normalize=False,
            hyper=hyper,
        )
        return train(recipe, folder, mesh)

    slots = -(-settings.slots // jax.local_device_count())  # of one device
    shapes = Shapes(config, rows, T, sampled=(slots, T), evaluates=False)
    return with_batch_size(settings, mesh, shapes, schedule, attempt, normalize=False, hyper=hyper)


_DECIDED = ("num_epochs", "task_data", "max_seq_len", "total_batch_size", "eval_examples", "eval_samples", "slots")


class _Sampler:
    """Makes the batches of a run, with one engine whose compiled programs are kept."""

    def __init__(self, settings: RlSettings, config, parent: Parent, task, T: int, mesh):
        self.settings, self.config, self.tokenizer, self.task, self.T = settings, config, parent.tokenizer, task, T
        self._micro = settings.device_batch_size * sharding.row_shards(mesh)
        self._devices = list(mesh.devices.flat) if jax.process_count() == 1 else None  # which share the rollouts
        self._engine: Engine | None = None
        self._statistics = jax.jit(lambda params, x, y: token_statistics(config, params, x, y))
        self._reference = parent.params() if settings.kl else None

    def engine(self, params) -> Engine:
        if self._engine is None:
            s = self.settings
            self._engine = Engine(
                self.config, params, self.tokenizer, slots=s.slots, capacity=self.T, logprobs=True, steps_per_call=16,
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
        rewards = np.array([[a.reward for a in group] for group in groups], np.float32)
        answers = [a for group in groups for a in group]
        pad = self.tokenizer.encode_special("<|assistant_end|>")
        packed = rollouts.pack(answers, self.T, pad, s.train_stop_token)
        # the trainer's own view: of all rows where the loss needs it, else of one answer to every question
        rows = np.arange(0, len(answers), 1 if s.clip or s.kl else s.num_samples)
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
            "completion_length": float(np.mean([len(a.tokens) for a in answers])),
            "unfinished": float(np.mean([not a.ended for a in answers])),
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
        whole = np.resize(rows, -(-len(rows) // self._micro) * self._micro)  # the last micro-batch is filled up
        parts = [
            self._statistics(params, packed.inputs[some], packed.targets[some])
            for some in whole.reshape(-1, self._micro)
        ]
        now, entropy = (np.concatenate([np.asarray(part[k]) for part in parts])[: len(rows)] for k in (0, 1))
        return now, entropy


def _transcripts(groups: list[list[rollouts.Answer]], tokenizer) -> list[dict]:
    """The best and the worst answer of each question, as text."""
    kept = []
    for group in groups:
        ordered = sorted(group, key=lambda a: a.reward)
        for answer in [ordered[-1], *(ordered[:1] if ordered[0].reward < ordered[-1].reward else [])]:
            prompt = tokenizer.decode(answer.prompt[1:])
            kept.append({"question": answer.question, "prompt": prompt, "answer": answer.text, "reward": answer.reward})
    return kept
