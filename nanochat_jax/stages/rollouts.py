"""Rollouts: questions are completed, rewards say how well, advantages become weights of the loss.

On-policy policy gradient (REINFORCE with the group's mean reward as baseline; GRPO, arXiv:2402.03300, without its
division by the deviation). Maximising sum(advantage * log p) is minimising the one loss of this project,
sum(weight * nll), with weight = advantage. Also the optional extras are weights: they are known before the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import Completion, SamplingParams, question_seed


class RewardedCompletion(NamedTuple):
    """A sampled completion of question number `question`, with the engine's log-probabilities."""

    question: int
    completion: Completion
    reward: float


def collect(
    engine: Engine, tokenizer: Any, task: Any, questions: Sequence[int], *, num_samples: int, params: SamplingParams
) -> list[list[RewardedCompletion]]:
    """num_samples completions of each question of a task with `reward(conversation, completion)`, all through the
    engine.

    They depend on the model's parameters, the questions and `params` only (whose seed is the step's).
    """
    # 1. Ask every question num_samples times: its own seed, and a sample_index for each completion.
    conversations = [task[i] for i in questions]
    prompts, each = [], []
    for index, conversation in zip(questions, conversations, strict=True):
        prompts += [tokenizer.render_for_completion(conversation)] * num_samples
        own = replace(params, seed=question_seed(params.seed, index), logprobs=0)
        each += [replace(own, sample_index=sample) for sample in range(num_samples)]

    # 2. Sample all completions together; the slots stay full until the last of them.
    completions = engine.generate(prompts, each)

    # 3. Reward each, and group them by question again.
    groups = []
    for n, (index, conversation) in enumerate(zip(questions, conversations, strict=True)):
        own = completions[n * num_samples : (n + 1) * num_samples]
        groups.append([RewardedCompletion(index, c, float(task.reward(conversation, c.text))) for c in own])
    return groups


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Reward minus the mean reward of the question's samples: (questions, samples) -> the same shape, float32."""
    rewards = np.asarray(rewards, np.float32)
    return rewards - rewards.mean(axis=1, keepdims=True)


@dataclass(frozen=True)
class Packed:
    """Completions as rows of T tokens: inputs, targets (rows, T) int32 with -1 where nothing is trained on (prompt,
    forced tokens, padding), and the engine's log-probabilities of the targets (0 where ignored)."""

    inputs: np.ndarray
    targets: np.ndarray
    logprobs: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        return (self.targets >= 0).astype(np.float32)


def pack(completions: Sequence[Completion], T: int, pad: int, train_stop_token: bool = True) -> Packed:
    """Rows of one completion each. The reference never trains on the end token, so the model does not learn to stop; we
    do, unless `train_stop_token` is off. Raises ValueError where prompt and completion exceed T + 1 tokens."""
    inputs = np.full((len(completions), T), pad, np.int32)
    targets = np.full((len(completions), T), -1, np.int32)
    logprobs = np.zeros((len(completions), T), np.float32)
    for row, c in enumerate(completions):
        n = len(c.tokens) - (1 if c.finish_reason == "end" and not train_stop_token else 0)
        ids = c.prompt + c.tokens[:n]
        if len(ids) > T + 1:
            raise ValueError(f"a prompt and completion of {len(ids)} tokens do not fit a row of {T}")
        inputs[row, : len(ids)] = ids[:T]
        where = slice(len(c.prompt) - 1, len(ids) - 1)  # positions that predict the completion's tokens
        sampled = np.array(c.masks[:n], bool)
        targets[row, where] = np.where(sampled, c.tokens[:n], -1)
        if c.logprobs:
            logprobs[row, where] = np.where(sampled, c.logprobs[:n], 0.0)
    return Packed(inputs, targets, logprobs)


def weights(
    packed: Packed,
    advantage: np.ndarray,
    *,
    now: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    clip: float = 0.0,
    kl: float = 0.0,
) -> np.ndarray:
    """The loss weights (rows, T) float32: advantage / number of tokens trained on in the whole batch, 0 where ignored.

    advantage (rows,). Token-level normalisation over the step (the reference divides by the tokens of each pass of 8
    rows, then averages passes). now, reference (rows, T): log-probabilities of the policy before the update and of the
    model it started from. clip > 0: the clipped importance ratio of PPO (arXiv:1707.06347) between trainer and sampler,
    min(r A, clip(r, 1 - clip, 1 + clip) A); its gradient is r A grad log p where the ratio is not clipped, else 0. kl >
    0: subtracts kl * (now - reference) from every token's advantage.
    """
    # 1. Every token of a completion has the completion's advantage.
    mask = packed.mask
    per_token = np.broadcast_to(np.asarray(advantage, np.float32)[:, None], mask.shape)
    # 2. Less a penalty for moving away from the model it started from.
    if kl:
        assert now is not None and reference is not None, "kl needs both log-probabilities"
        per_token = per_token - np.float32(kl) * (now - reference)
    # 3. Times the importance ratio of trainer and sampler, 0 where it is clipped.
    if clip:
        assert now is not None, "clip needs the trainer's log-probabilities"
        ratio = np.exp(now - packed.logprobs)
        inactive = np.where(per_token > 0, ratio > 1 + clip, ratio < 1 - clip)
        per_token = np.where(inactive, 0.0, ratio * per_token)
    # 4. The mean over the tokens that are trained on.
    return (per_token * mask / max(1.0, float(mask.sum()))).astype(np.float32)
