"""Chat evaluations: the most likely letter of a multiple-choice question, and judged answers to open ones.

All problems of a task go to the model together: letters through length-sorted forward passes, answers through the
slots of the engine, which stay full until the last problems. Prompts, predicted letters and greedy completions are the
reference's (golden chateval_v1.json); it runs one problem at a time.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np

from nanochat_jax.evals import results, stats
from nanochat_jax.inference import model_runner
from nanochat_jax.inference.engine import MOST_STEPS, Engine
from nanochat_jax.inference.request import Completion, SamplingParams, question_seed
from nanochat_jax.model import gpt
from nanochat_jax.model.kv_in_place import decode_access
from nanochat_jax.utils.errors import InputError
from tasks.sandbox import SandboxUnavailable

Progress = Callable[[int, int, float], None]  # (problems done, problems, accuracy so far)

CHUNK = 1024  # prompts scored between two reports of progress
MAX_SLOTS_CPU, MAX_SLOTS = 32, 256
CACHE_SHARE = 0.5  # of the free memory of an accelerator, for the engine's slots
CACHE_BYTES_CPU = 1 << 30


class ChoiceScorer(Protocol):
    """What evaluating letters needs (`nanochat_jax.evals.scorer.Scorer` has it)."""

    def choices(self, prompts: Sequence[Sequence[int]], letters: Sequence[Sequence[int]]) -> list[np.ndarray]: ...


# --- multiple choice ------------------------------------------------------------------------------------------------


def evaluate_categorical(
    scorer: ChoiceScorer,
    tokenizer: Any,
    task: Any,
    *,
    max_problems: int | None = None,
    progress: Progress | None = None,
) -> results.Result:
    """Accuracy of the letter that the model finds most likely right after the prompt; the first one on ties.

    task: a sequence of conversations with "letters", and `evaluate(conversation, letter)`. Nothing is generated.
    Raises ValueError for an empty task or a letter that is not one token.
    """
    began = time.monotonic()
    n = problem_count(task, max_problems)
    conversations = [task[i] for i in range(n)]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    letter_id = functools.cache(lambda letter: _letter_id(tokenizer, letter))
    letters = [[letter_id(letter) for letter in conversation["letters"]] for conversation in conversations]
    items: list[dict] = [{}] * n
    order = sorted(range(n), key=lambda i: -len(prompts[i]))
    done = right = 0
    for begin in range(0, n, CHUNK):
        chunk = order[begin : begin + CHUNK]
        scores = scorer.choices([prompts[i] for i in chunk], [letters[i] for i in chunk])
        for i, logits in zip(chunk, scores, strict=True):
            predicted = conversations[i]["letters"][int(np.argmax(logits))]
            correct = int(task.evaluate(conversations[i], predicted))
            items[i] = {"id": _item_id(i, conversations[i]), "correct": correct, "predicted": predicted}
            right += correct
        done += len(chunk)
        if progress:
            progress(done, n, right / done)
    settings = categorical_settings(task, max_problems)
    return results.scored(task.name, "categorical", items, _baseline(task), settings, time.monotonic() - began)


def categorical_settings(task: Any, max_problems: int | None = None) -> dict[str, Any]:
    """What decides a categorical result besides the model."""
    return {"max_problems": max_problems, "data": _fingerprint(task)}


def _letter_id(tokenizer: Any, letter: str) -> int:
    ids = tokenizer.encode_text(letter)
    if len(ids) != 1:
        raise InputError(
            f"the choice {letter!r} is {len(ids)} tokens in this tokenizer, and the answer to a multiple-choice "
            "question is one: use letters that are single tokens"
        )
    return ids[0]


# --- open questions -------------------------------------------------------------------------------------------------


def evaluate_generative(
    engine: Engine,
    tokenizer: Any,
    task: Any,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int = 50,
    seed: int = 42,
    max_problems: int | None = None,
    progress: Progress | None = None,
) -> results.Result:
    """The share of problems that at least one of num_samples answers solves, and pass@k for every k up to it.

    task: a sequence of conversations, and `evaluate(conversation, completion)`; that runs in threads, so that slow
    judges (running programs) do not hold up the decoder. A completion is decoded with its tool calls and their forced
    results, without the end token. Answers depend on the model, the problem and the seed, not on the engine's slots.

    Beyond `results.scored`: "pass_at_k" and "pass_at_k_interval" ({"1": ...}), "unfinished" (share of completions cut
    off at max_new_tokens), "cut_prompts" (prompts too long for a slot, which lost their first tokens), "new_tokens". An
    item has "n_correct", "unfinished" (of its samples) and "completion" (its first). Where the host cannot isolate the
    programs that a task runs the result has "skipped" instead of figures.

    Raises ValueError for an empty task, or several samples at temperature 0.
    """
    if num_samples < 1 or max_new_tokens < 1:
        raise InputError(f"num_samples and max_new_tokens must be at least 1, got {num_samples} and {max_new_tokens}")
    if num_samples > 1 and temperature == 0:
        raise InputError(f"{num_samples} samples at temperature 0 are all the same: give a temperature, such as 1.0")
    began = time.monotonic()
    n = problem_count(task, max_problems)
    conversations = [task[i] for i in range(n)]
    sampling = dict(
        num_samples=num_samples, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    settings = generative_settings(task, max_problems=max_problems, **sampling)
    try:
        task.evaluate(conversations[0], "")  # can it judge here? Better asked before anything is generated
        params = SamplingParams(max_new_tokens, temperature, top_k, seed=seed)
        samples, cut_prompts = _answers(engine, tokenizer, task, conversations, num_samples, params, progress)
    except SandboxUnavailable as error:
        return {"task": task.name, "kind": "generative", "settings": settings, "skipped": str(error)}
    items = []
    for i, group in enumerate(samples):
        items.append(
            {
                "id": _item_id(i, conversations[i]),
                "correct": int(any(sample.correct for sample in group)),
                "n_correct": sum(sample.correct for sample in group),
                "unfinished": sum(sample.completion.finish_reason == "length" for sample in group),
                "completion": group[0].completion.text,
            }
        )
    counts = np.array([item["n_correct"] for item in items])
    passes = {str(k): stats.pass_at_k(num_samples, counts, k) for k in range(1, num_samples + 1)}
    more = {
        "pass_at_k": {k: float(values.mean()) for k, values in passes.items()},
        "pass_at_k_interval": {k: list(stats.bootstrap_interval(values)) for k, values in passes.items()},
        "unfinished": sum(item["unfinished"] for item in items) / (n * num_samples),
        "cut_prompts": cut_prompts,
        "new_tokens": sum(len(sample.completion.tokens) for group in samples for sample in group),
    }
    seconds = time.monotonic() - began
    return results.scored(task.name, "generative", items, _baseline(task), settings, seconds, **more)


def generative_settings(task: Any, **settings) -> dict[str, Any]:
    """What decides a generative result besides the model: the keyword arguments, the data, and where that can be chosen
    how answers are judged."""
    judge = getattr(task, "judge", None)
    return {**settings, "data": _fingerprint(task), **({"judge": judge} if judge else {})}


@dataclass(frozen=True)
class _Sample:
    """One judged answer."""

    completion: Completion
    correct: bool


def _answers(
    engine: Engine, tokenizer, task, conversations, num_samples: int, params: SamplingParams, progress: Progress | None
) -> tuple[list[list[_Sample]], int]:
    """(samples of each problem, judged; prompts cut): everything is queued, the slots work it off."""
    n, cut_prompts = len(conversations), 0
    longest = params.max_tokens or engine.capacity
    prompts = []
    for conversation in conversations:
        ids = tokenizer.render_for_completion(conversation)
        prompts.append(_fitting(ids, engine.capacity, longest))
        cut_prompts += len(prompts[-1]) < len(ids)
    asked, each = [], []
    # Rows of about the same length side by side: a decode call looks at as many positions as its longest row has.
    for i in sorted(range(n), key=lambda i: -len(prompts[i])):
        fits = min(longest, engine.capacity - len(prompts[i]) + 1)
        for sample in range(num_samples):
            asked.append(i)
            each.append(replace(params, max_tokens=fits, seed=question_seed(params.seed, i), sample_index=sample))

    judging: dict[Future, int] = {}  # answers that are being judged
    correct = [False] * len(asked)
    open_samples, passed, done = [num_samples] * n, [False] * n, 0

    def book(judged: list[Future]) -> None:
        nonlocal done
        for future in judged:
            index = judging.pop(future)
            correct[index] = bool(future.result())
            passed[asked[index]] |= correct[index]
            open_samples[asked[index]] -= 1
            done += open_samples[asked[index]] == 0
        if progress and judged and done:
            progress(done, n, sum(p for p, rest in zip(passed, open_samples, strict=True) if not rest) / done)

    def judge(index: int, completion: Completion) -> None:
        judging[pool.submit(task.evaluate, conversations[asked[index]], completion.text)] = index
        book([future for future in judging if future.done()])

    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="judge")
    try:
        completions = engine.generate([prompts[i] for i in asked], each, on_finished=judge)
        for future in as_completed(list(judging)):
            book([future])
    finally:
        pool.shutdown(cancel_futures=True)
    groups: list[list[_Sample]] = [[] for _ in range(n)]
    for i, completion, right in zip(asked, completions, correct, strict=True):
        groups[i].append(_Sample(completion, right))
    return groups, cut_prompts


def _fitting(ids: list[int], capacity: int, max_new_tokens: int) -> list[int]:
    """A prompt that leaves space for an answer: max_new_tokens, or half a slot. The first token (bos) and the end stay.

    The reference has no slots and lets such prompts run. `eval_engine` makes slots long enough, so it takes a prompt
    near the model's rotary range to get here.
    """
    longest = capacity + 1 - min(max_new_tokens, max(1, capacity // 2))
    return ids if len(ids) <= longest else [ids[0], *ids[len(ids) - longest + 1 :]]


def eval_engine(
    config: gpt.GPTConfig,
    params: gpt.Params,
    tokenizer: Any,
    longest_prompt: int,
    max_new_tokens: int,
    *,
    rows: int | None = None,
    slots: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Engine:
    """An engine whose slots hold any prompt and its answer; `rows` (problems x samples): more slots are never of use.

    slots None: as many as pay off (32 on a CPU, 256 on each accelerator) and as the cache may take: 1 GiB on a CPU,
    half of the free memory of an accelerator, with what decoding copies. devices: which share the work (default: the
    first alone).
    """
    capacity = min(longest_prompt + max_new_tokens, 10 * config.sequence_len)
    if slots is None:
        most = MAX_SLOTS_CPU if jax.default_backend() == "cpu" else MAX_SLOTS
        slots = len(devices or [0]) * min(most, max(1, _cache_bytes() // _slot_bytes(config, capacity)))
        slots = min(slots, rows or slots)
    return Engine(config, params, tokenizer, slots=slots, capacity=capacity, devices=devices, wait_for_tools=True)


def _slot_bytes(config: gpt.GPTConfig, capacity: int) -> int:
    """Of one slot, and of what a decode call copies of it."""
    positions = model_runner.slot_length(capacity, MOST_STEPS)
    if decode_access(config, jax.default_backend()) == "copied":
        positions += model_runner.largest_copy(positions)
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * np.dtype(config.dtype).itemsize * positions


def _cache_bytes() -> int:
    memory = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if not memory:
        return CACHE_BYTES_CPU
    return int(CACHE_SHARE * (memory["bytes_limit"] - memory["bytes_in_use"]))


def longest_prompt(tokenizer: Any, task: Any, max_problems: int | None = None) -> int:
    """Tokens of a task's longest prompt."""
    n = problem_count(task, max_problems)
    return max(len(tokenizer.render_for_completion(task[i])) for i in range(n))


# --- both -----------------------------------------------------------------------------------------------------------


def problem_count(task: Any, max_problems: int | None = None) -> int:
    """How many problems are evaluated: the first max_problems (None: all). Raises ValueError if that is none."""
    if max_problems is not None and max_problems < 1:
        raise InputError(f"max_problems must be at least 1 (None: all of them), got {max_problems}")
    n = min(len(task), max_problems or len(task))
    if n == 0:
        raise InputError(f"the task {task.name} has no problems to evaluate")
    return n


def _item_id(index: int, conversation: dict) -> str:
    """Names a problem by its place and its content, so that only results of the same problems are ever compared."""
    content = json.dumps(conversation["messages"], sort_keys=True).encode()
    return f"{index}-{hashlib.sha256(content).hexdigest()[:8]}"


def _baseline(task: Any) -> float:
    return float(getattr(task, "baseline", 0.0))


def _fingerprint(task: Any) -> str | None:
    return task.fingerprint()[:16] if hasattr(task, "fingerprint") else None
