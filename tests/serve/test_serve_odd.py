"""Odd but legal: what clients of other servers send. Nothing is refused that vLLM takes, but what the docs list."""

import concurrent.futures
import json
import random

import pytest

from nanochat_jax.serve import prompts, schemas
from nanochat_jax.serve.ignored import IgnoredFields
from nanochat_jax.serve.worker import DEFAULTS
from nanochat_jax.text.prompts import chat_prompt
from tests.serve_fixtures import serving, toy_engine
from tests.tokenizer_fixtures import golden_tokenizer


@pytest.fixture(scope="module")
def tiny():
    with serving(toy_engine()) as running:  # whose programs other files have compiled
        yield running


TEXTS = [
    "",
    " ",
    "Hello",
    "naïve 🚀",
    "<|assistant_end|>",
    "<12+30=42>",
    "a\x00b",
    "\u2028",
    "\\",
    '{"a": 1}',
    "x" * 90,
]
KEYS = [
    "id",
    "name",
    "refusal",
    "cache_control",
    "reasoning_content",
    "annotations",
    "audio",
    "parts",
    "tool_calls",
    "ö",
]
# fields with values that are legal somewhere and may have no effect here
FIELDS: dict[str, list] = {
    "temperature": [0, 1, 0.5, 2, None], "top_p": [1, 0.9, None], "top_k": [-1, 0, 5, 10**6, None],
    "seed": [0, -1, 2**63 - 1, 7, None], "n": [1, 2, 3, None], "stream": [True, False, None],
    "stop": [None, [], "zz", ["zz", "yy"], list("1234")], "user": ["me", None], "metadata": [{}, {"a": "b"}, None],
    "stream_options": [None, {}, {"include_usage": True}, {"include_usage": False, "continuous_usage_stats": True}],
    "frequency_penalty": [0, 0.0, None], "presence_penalty": [0, None], "logit_bias": [None, {}],
    "priority": [0, 3], "request_id": ["r-1"], "cache_salt": ["x"], "chat_template_kwargs": [{"a": False}],
    "mm_processor_kwargs": [None, {}], "skip_special_tokens": [True], "spaces_between_special_tokens": [True],
    "length_penalty": [1.0], "use_beam_search": [False], "min_tokens": [0], "truncate_prompt_tokens": [None],
    "allowed_token_ids": [None], "bad_words": [[]], "guided_grammar": [None], "kv_transfer_params": [None],
    "vllm_xargs": [None, {"a": 1}], "structured_outputs": [None], "include_reasoning": [True],
    "reasoning_effort": ["low", "high", None], "verbosity": ["low"], "service_tier": ["auto", "flex", None],
    "store": [True, False, None], "prediction": [None, {"type": "content", "content": "x"}],
    "prompt_cache_key": ["k"], "safety_identifier": ["s"], "provider": [{"order": ["a"]}], "transforms": [[]],
    "num_ctx": [2048], "mirostat": [0], "cache_prompt": [True], "keep_alive": ["5m"], "extra_body": [{}], "": [1],
}  # fmt: skip
CHAT_FIELDS: dict[str, list] = {
    "tools": [None, []], "tool_choice": [None, "none", "auto"], "parallel_tool_calls": [True, False, None],
    "response_format": [None, {"type": "text"}], "modalities": [None, ["text"], ["text", "audio"]],
    "max_completion_tokens": [1, 3, None], "continue_final_message": [False, None], "logprobs": [False, None],
    "add_generation_prompt": [True, False, None], "top_logprobs": [None, 0], "documents": [None],
    "functions": [None, []],
}  # fmt: skip
KINDS = [
    None,
    "",
    "application/json",
    "application/json; charset=utf-8",
    "text/plain",
    "application/x-www-form-urlencoded",
]


def content(rng: random.Random, role: str):
    if role == "assistant" and rng.random() < 0.2:
        return None
    if rng.random() < 0.5:
        return rng.choice(TEXTS)
    kinds = ["text", "input_text", "output_text", *(["python", "python_output"] if role == "assistant" else [])]
    parts = []
    for _ in range(rng.randint(0, 3)):
        part = {"type": rng.choice(kinds), "text": rng.choice(TEXTS)}
        if part["type"] == "text":
            part = rng.choice([part, {"text": part["text"]}, part["text"], {**part, "cache_control": {"type": "x"}}])
        parts.append(part)
    return parts


def legal(rng: random.Random) -> tuple[str, dict]:
    """(path, body)"""
    chat = rng.random() < 0.7
    body: dict = {"max_tokens": rng.randint(1, 3)}
    fields = {**FIELDS, **(CHAT_FIELDS if chat else {})}
    for name in rng.sample(list(fields), rng.randint(0, 12)):
        body[name] = rng.choice(fields[name])
    if not chat:
        ids = [rng.randint(0, 255) for _ in range(rng.randint(1, 5))]
        texts = rng.choices(TEXTS, k=rng.randint(1, 3))
        body["prompt"] = rng.choice([rng.choice(TEXTS), texts, ids, [ids, ids], None])
        return "/v1/completions", body
    messages = []
    for _ in range(rng.randint(1, 5)):
        role = rng.choice(["user", "user", "assistant", "assistant", "system", "developer"])
        message = {"role": role, "content": content(rng, role)}
        if role == "assistant" and message["content"] is None and rng.random() < 0.5:
            del message["content"]
        for key in rng.sample(KEYS, rng.randint(0, 2)):
            message[key] = None if key == "tool_calls" else rng.choice([None, "x", 3, {"a": [1]}, []])
        messages.append(message)
    body["messages"] = messages
    return "/v1/chat/completions", body


def send(running, count: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        path, body = legal(rng)
        kind = rng.choice(KINDS)
        headers = {} if kind is None else {"Content-Type": kind}
        text = json.dumps(body, ensure_ascii=rng.random() < 0.5)
        answer = running.http.post(path, content=text.encode(), headers=headers, timeout=30)
        fits = answer.status_code == 200 or answer.json()["error"]["code"] == "context_length_exceeded"
        assert fits, (text, answer.text)
    running.idle()


def test_odd_but_legal():
    """Without a server: they are valid, and have a prompt."""
    rng = random.Random(0)
    for _ in range(500):
        path, body = legal(rng)
        schema = schemas.ChatRequest if "chat" in path else schemas.CompletionRequest
        request = schema.model_validate(json.loads(json.dumps(body)))
        request.sampling(DEFAULTS)
        assert set(IgnoredFields(strict=False).headers(request)) <= {"X-Ignored-Fields"}
        if isinstance(request, schemas.ChatRequest):
            messages = [message.model_dump(include={"role", "content"}) for message in request.messages]
            assert chat_prompt(messages, golden_tokenizer(), **prompts._ending(request))


@pytest.mark.slow
def test_thousands_of_odd_but_legal_bodies(tiny):
    send(tiny, 2000, 1)


# --- what a completion costs -----------------------------------------------------------------------------------------


def stopped(running, count: int, seed: int) -> None:
    """The tokens of a completion that ends at a stop string are those up to the one that completes it, whatever else
    the server does."""
    rng = random.Random(seed)
    asked = []
    for i in range(count):
        stop = ["".join(rng.choices("abcdefgh xyz", k=rng.choice([1, 1, 2]))) for _ in range(rng.randint(1, 4))]
        asked.append({"prompt": "abc"[i % 3], "max_tokens": 80, "temperature": 1.0, "seed": i, "stop": stop})

    def ask(body) -> tuple[str, str, int]:
        answer = running.post("/v1/completions", **body).json()
        choice = answer["choices"][0]
        return choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]

    idle = [ask(body) for body in asked]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, asked)) == idle, "under load"
    assert sum(reason == "stop" for _, reason, _ in idle) > count / 3
    for body, (text, _, tokens) in list(zip(asked, idle, strict=True))[:8]:
        answer = running.post("/v1/completions", **body, stream=True, stream_options={"include_usage": True}).text
        chunks = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == text
        assert chunks[-1]["usage"]["completion_tokens"] == tokens
    for body, (text, reason, tokens) in list(zip(asked, idle, strict=True))[:20]:
        if reason == "stop":
            one_less = ask({**body, "max_tokens": tokens - 1}) if tokens > 1 else ("", "length", 0)
            assert one_less[1] == "length" and ask({**body, "max_tokens": tokens}) == (text, reason, tokens)


def test_usage_after_a_stop_string(tiny):
    stopped(tiny, 24, 0)


@pytest.mark.slow
def test_usage_after_a_thousand_stop_strings(tiny):
    stopped(tiny, 1000, 1)
