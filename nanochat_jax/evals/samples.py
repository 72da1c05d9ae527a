"""Samples: what a model makes of a few fixed prompts, greedily, while it trains and when it is evaluated."""

from collections.abc import Callable

import jax

from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model.gpt import GPTConfig, Params
from nanochat_jax.text.tokenizer import Tokenizer

# The reference's prompts, so that samples can be compared with its logs.
TEXTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)
QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What is 34 + 27?",
    'Spell the word "garden".',
    "What is the capital of France?",
)
TEXT_TOKENS, ANSWER_TOKENS = 24, 64  # the longest continuation of a text, the longest answer to a question


def text_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """TEXTS as token prompts."""
    return [tokenizer.encode(text, prepend=tokenizer.bos_id) for text in TEXTS]


def chat_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """QUESTIONS as token prompts that wait for the assistant."""
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": ""}] for q in QUESTIONS]
    return [tokenizer.render_for_completion({"messages": messages}) for messages in turns]


def greedy_sampler(
    config: GPTConfig, tokenizer: Tokenizer, prompts: list[list[int]], max_tokens: int
) -> Callable[[Params], list[str]]:
    """Parameters -> the prompts with what follows them, as text, all written side by side by one engine."""
    engines: list[Engine] = []  # made at the first use and kept with its compiled programs

    def sample(params: Params) -> list[str]:
        # one device is enough for a few prompts: with parameters on all of them, all would write the same
        params = jax.tree.map(_of_one_device, params)
        if not engines:
            capacity = max(map(len, prompts)) + max_tokens
            engines.append(Engine(config, params, tokenizer, slots=len(prompts), capacity=capacity))
        engine = engines[0]
        engine.params = params
        completions = engine.generate(prompts, SamplingParams(max_tokens, temperature=0.0))
        return [tokenizer.decode([*c.prompt[1:], *c.tokens]) for c in completions]

    return sample


def _of_one_device(array):
    """The first device's copy of an array that is on all of them; anything else as it is."""
    several = isinstance(array, jax.Array) and len(array.sharding.device_set) > 1
    return array.addressable_data(0) if several and array.is_fully_replicated else array
