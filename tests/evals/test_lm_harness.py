"""The lm-eval adapter: our own scoring and decoding behind the harness's interface, and a local task run through it."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from nanochat_jax.evals.lm_harness import NanochatLM  # noqa: E402
from nanochat_jax.model import gpt  # noqa: E402
from nanochat_jax.model.gpt import GPTConfig  # noqa: E402
from nanochat_jax.text.tokenizer import Tokenizer  # noqa: E402
from tests import children
from tests.toy_params import toy_params

forward = jax.jit(gpt.forward, static_argnums=0)


@pytest.fixture(scope="module")
def lm():
    tokenizer = Tokenizer.train(["the cat sat on the mat, it's the bat's hat"] * 4, 290)
    config = GPTConfig(sequence_len=24, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
    return NanochatLM.of(config, toy_params(config), tokenizer, max_gen_toks=6)


def requests(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def logprobs(lm, ids):
    """log-probabilities (T, V) after each of the ids, by the plain forward pass."""
    padded = jnp.asarray([*ids, *[0] * (32 - len(ids))])[None]  # one shape, one program
    logits = forward(lm.config, lm._params, padded)[0, : len(ids)]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


def test_loglikelihood_is_the_forward_passs(lm):
    cases = [("the cat", " sat on"), ("", "the mat"), ("the  ", "bat"), ("the cat sat", " on the mat, it's")]
    answers = lm.loglikelihood(requests("loglikelihood", *cases))
    for (context, continuation), (value, greedy) in zip(cases, answers, strict=True):
        whole = [lm.tokenizer.bos_id, *lm.tokenizer.encode(context + continuation)]
        start = 1 + len(lm.tokenizer.encode(context.rstrip()))
        table = logprobs(lm, whole)
        assert value == pytest.approx(sum(table[i - 1, whole[i]] for i in range(start, len(whole))), abs=1e-4)
        assert greedy == all(table[i - 1].argmax() == whole[i] for i in range(start, len(whole)))


def test_rolling_predicts_every_token_once(lm):
    short, long = "the cat sat", "the cat sat on the mat, " * 8
    value, longer = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (short,), (long,)))
    ids = lm.tokenizer.encode(short)
    table = logprobs(lm, [lm.tokenizer.bos_id, *ids])
    assert value == pytest.approx(sum(table[i, t] for i, t in enumerate(ids)), abs=1e-4)
    assert len(lm.tokenizer.encode(long)) > lm.max_length and np.isfinite(longer) and longer < value


def test_generation_is_greedy_and_stops(lm):
    free, cut, sampled = lm.generate_until(
        requests("generate_until", ("the cat", {"until": []}), ("the cat", {"until": ["\n\n"], "max_gen_toks": 3}),
                 ("the cat", {"until": [], "do_sample": True, "temperature": 1.0}))
    )  # fmt: skip
    ids, said = lm.encode("the cat"), []
    for _ in range(6):
        token = int(logprobs(lm, ids + said)[-1].argmax())
        if token in (lm.tokenizer.bos_id, lm.tokenizer.encode_special("<|assistant_end|>")):
            break
        said.append(token)
    assert free == lm.tokenizer.decode(said) and free.startswith(cut) and isinstance(sampled, str)
    middle = free[len(free) // 2 : len(free) // 2 + 2]
    (stopped,) = lm.generate_until(requests("generate_until", ("the cat", {"until": [middle]})))
    assert middle and stopped == free[: free.index(middle)]
    (long,) = lm.generate_until(requests("generate_until", ("the cat sat on the mat " * 20, {"until": "\n"})))
    assert isinstance(long, str)


def test_chats_are_rendered_as_ours_and_plain_text_stays_plain(lm):
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    text = lm.apply_chat_template(chat[:1])
    assert lm.encode(text) == lm.tokenizer.render_for_completion({"messages": chat})
    opened = lm.encode(lm.apply_chat_template(chat, add_generation_prompt=False))
    assert opened == lm.tokenizer.render_conversation({"messages": chat})[0][:-1]
    assert lm.encode("say <|bos|>") == [lm.tokenizer.bos_id, *lm.tokenizer.encode("say <|bos|>")]
    assert lm.tokenizer.hash.startswith(lm.tokenizer_name.rpartition("-")[2])


def test_the_harness_runs_a_local_task_file(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [{"q": "the cat", "options": [" sat", " mat"], "answer": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        + str(tmp_path / "rows.jsonl")
        + "\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{options}}'\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(lm, tasks=["mine"], task_manager=manager, bootstrap_iters=0, log_samples=False)
    assert found is not None and found["results"]["mine"]["acc,none"] == 0.5


@pytest.mark.slow
def test_the_command_line_is_the_harnesss_own_with_our_model():
    command = [sys.executable, "-m", "nanochat_jax.evals.lm_harness", "--tasks", "mine", "--model_args", "run=no-such"]
    done = children.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode and "mine" in done.stderr + done.stdout and "already registered" not in done.stderr
