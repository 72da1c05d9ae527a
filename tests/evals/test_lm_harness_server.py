"""lm-eval's clients of other people's servers, against ours: the same scores as our own adapter gives."""

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI  # noqa: E402

from nanochat_jax.evals.lm_harness import NanochatLM  # noqa: E402
from nanochat_jax.inference.engine import Engine  # noqa: E402
from nanochat_jax.model.gpt import GPTConfig  # noqa: E402
from tests.serve_fixtures import serving  # noqa: E402
from tests.tokenizer_fixtures import golden_tokenizer  # noqa: E402
from tests.toy_params import toy_params  # noqa: E402

PAIRS = [
    ("The cat sat", " on the mat."), ("Question: what is blue? Answer:", " the sky"), ("naïve 🚀", " text\nand more"),
    ("word " * 70, "is long"), ("a", "b"),
]  # fmt: skip


@pytest.fixture(scope="module")
def both():
    tokenizer = golden_tokenizer()
    size = dict(sequence_len=256, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
    config = GPTConfig(**size)
    params = toy_params(config)
    with serving(Engine(config, params, tokenizer, slots=2)) as running:
        yield NanochatLM.of(config, params, tokenizer, max_length=255), running


def requests(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_local_completions_scores_as_our_adapter(both, batch_size):
    ours, running = both
    base_url = f"{running.url}/v1/completions"
    theirs = LocalCompletionsAPI(
        base_url=base_url, model="tiny", tokenized_requests=False, max_length=256, batch_size=batch_size
    )
    assert theirs.tokenizer_backend == "remote"
    expected = ours.loglikelihood(requests("loglikelihood", *PAIRS))
    found = theirs.loglikelihood(requests("loglikelihood", *PAIRS))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    wanted = {"until": ["\n\n"], "max_gen_toks": 5, "temperature": 0}
    (said,) = theirs.generate_until(requests("generate_until", ("The cat", wanted)))
    assert [said] == ours.generate_until(requests("generate_until", ("The cat", wanted)))


@pytest.mark.slow
def test_local_chat_completions_answers(both):
    _, running = both
    chats = LocalChatCompletion(base_url=f"{running.url}/v1/chat/completions", model="tiny", eos_string="<|x|>")
    prompt = chats.apply_chat_template([{"role": "user", "content": "Hello"}])
    wanted = {"until": ["\n"], "max_gen_toks": 5, "temperature": 0}
    (said,) = chats.generate_until(requests("generate_until", (prompt, wanted)))
    answer = running.openai().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=5, temperature=0, stop=["\n"]
    )
    assert said == answer.choices[0].message.content
