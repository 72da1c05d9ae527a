"""An engine without a model: it answers with given tokens. As a program: a terminal chat with one that talks back."""

import sys

from nanochat_jax.inference.request import Request
from tests.tokenizer_fixtures import golden_tokenizer


class Scripted:
    """Answers with given tokens, a few per step, and remembers what it was asked."""

    capacity = 64

    def __init__(self, *answers):
        self.answers, self.prompts, self.requests = list(answers), [], []

    def submit(self, prompt, max_tokens, temperature, top_k, seed, *, top_p):
        self.prompts.append(prompt)
        numbers = {"top_k": top_k, "top_p": top_p, "seed": seed, "stream": 0, "run_on": False, "number": 0}
        self.request = Request(prompt, max_tokens, temperature, **numbers)
        self.requests.append(self.request)
        self.left = list(self.answers.pop(0))[:max_tokens]
        self.ended = len(self.left) < max_tokens
        return self.request

    def step(self):
        part, self.left = self.left[:2], self.left[2:]
        self.request.tokens += part
        if not self.left:
            self.request.finished = "end" if self.ended else "length"
        return [type("Event", (), {"tokens": part})]

    def cancel(self, request):
        if request.finished is None:
            request.finished = "cancelled"


class Talkative(Scripted):
    """Says how many tokens the prompt has; to a question that holds "long", goes on until it is stopped."""

    capacity = 10_000

    def submit(self, prompt, max_tokens, *args, **kwargs):
        import time

        tokenizer = golden_tokenizer()
        question = tokenizer.decode(prompt).split("<|user_start|>")[-1].split("<|user_end|>")[0]
        self.pause = 0.02 if question == "long" else 0.0
        text = "na " * 400 if question == "long" else f"Echo {len(question) + 1}"
        self.answers.append([*text.encode(), tokenizer.encode_special("<|assistant_end|>")])
        self.sleep = lambda: time.sleep(self.pause)
        return super().submit(prompt, 10_000, *args, **kwargs)

    def step(self):
        self.sleep()
        return super().step()


if __name__ == "__main__":
    from nanochat_jax.terminal.app import talk
    from nanochat_jax.terminal.console import Screen
    from nanochat_jax.terminal.session import Chat, ChatSettings

    talk(Chat(Talkative(), golden_tokenizer(), ChatSettings(), completing=False), Screen(sys.stdout, True), "scripted")
