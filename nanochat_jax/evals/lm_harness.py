"""EleutherAI's lm-eval harness on our models: its tasks, or local task files, scored by our scorer and engine.

python -m nanochat_jax.evals.lm_harness --model_args run=d20-base --tasks arc_easy
python -m nanochat_jax.evals.lm_harness --model_args run=d20-sft --tasks mine --include_path DIR --apply_chat_template

Needs `pip install lm-eval`; flags are the harness's own. Prompts begin with bos, as documents do in training.
"""

import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from nanochat_jax.evals.scorer import Scorer
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model.gpt import GPTConfig, Params
from nanochat_jax.runs import checkpoint
from nanochat_jax.text import chat_format
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils import errors
from nanochat_jax.utils.errors import InputError

NAME = "nanochat_jax"
SLOTS = 8


@register_model(NAME)
class NanochatLM(LM):
    """A run as the harness sees it. Build it with `run=...` (as --model_args does) or with `of`.

    max_length: context in tokens, default the model's; longer prompts lose their first tokens. max_gen_toks: the
    longest completion where a task does not say.
    """

    def __init__(
        self,
        run: str | None = None,
        stage: str | None = None,
        step: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = None,  # the harness passes these three; what runs together is decided here
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        config, params, tokenizer, meta = checkpoint.load_model(run, stage, step)
        self._use(config, params, tokenizer, f"{meta['run']}@{meta['step']}", max_length, max_gen_toks)

    @classmethod
    def of(
        cls, config: GPTConfig, params: Params, tokenizer: Tokenizer, *, max_length: int | None = None, max_gen_toks=256
    ) -> "NanochatLM":
        """An adapter for a model in memory."""
        self = cls.__new__(cls)
        LM.__init__(self)
        self._use(config, params, tokenizer, "in memory", max_length, max_gen_toks)
        return self

    def _use(self, config, params, tokenizer, name: str, max_length: int | None, max_gen_toks: int) -> None:
        self.max_length = max_length or config.sequence_len
        if not 2 <= self.max_length <= 10 * config.sequence_len:
            raise InputError(f"max_length must lie between 2 and {10 * config.sequence_len}, got {self.max_length}")
        self.config, self.tokenizer, self.name, self.max_gen_toks = config, tokenizer, name, max_gen_toks
        self._params = params
        self._scorer = Scorer(config, params, max_length=self.max_length)
        self._engine: Engine | None = None
        special = tokenizer.special_tokens
        self._opening = chat_format.BOS + chat_format.USER_START if chat_format.USER_START in special else None

    # --- text to ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, bos first. Special tokens are read as such only in what `apply_chat_template` made."""
        if self._opening and text.startswith(self._opening):
            return self.tokenizer._encoding.encode(text, allowed_special="all")
        return [self.tokenizer.bos_id, *self.tokenizer.encode_text(text)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Context and continuation; encoded together, so that a token may not straddle them unseen; spaces between
        them belong to the continuation (the harness's convention)."""
        kept = context.rstrip()
        whole = self.encode(context + continuation)
        before = self.encode(kept) if kept else [self.tokenizer.bos_id]
        return before, whole[len(before) :]

    # --- what the harness calls -------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is what greedy decoding would say)."""
        pairs = [self._pair(*request.args) for request in requests]
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of whole texts, in windows of `max_length`; every token is predicted exactly once."""
        pairs, owner = [], []
        for i, request in enumerate(requests):
            ids = self.tokenizer.encode_text(request.args[0])
            windows = get_rolling_token_windows(ids, self.tokenizer.bos_id, self.max_length - 1, context_len=1)
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owner, self._score(pairs), strict=True):
            totals[i] += logprob
        return totals

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        items = [([*before, *after], len(before), len(before) + len(after)) for before, after in pairs]
        return [(-float(nll.sum(dtype="float64")), greedy) for _, greedy, nll in self._scorer.spans(items)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations up to the first stop string (left out), an end token, or the length; several at a time."""
        if self._engine is None:
            self._engine = Engine(self.config, self._params, self.tokenizer, slots=SLOTS, capacity=self.max_length)
        prompts, params = [], []
        for request in requests:
            arguments: Any = request.args
            prompt, wanted = arguments[0], dict(arguments[1])
            longest = max(1, min(int(wanted.get("max_gen_toks", self.max_gen_toks)), self.max_length - 1))
            stops = wanted.get("until") or []
            prompts.append(self.encode(prompt)[-(self.max_length - longest + 1) :])
            params.append(
                SamplingParams(
                    max_tokens=longest,
                    temperature=float(wanted.get("temperature", 0.0)) if wanted.get("do_sample", True) else 0.0,
                    top_k=int(wanted.get("top_k", 0)),
                    top_p=float(wanted.get("top_p", 1.0)),
                    stop=tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop),
                )
            )
        return [completion.text for completion in self._engine.generate(prompts, params)]

    # --- chat -------------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Without a generation prompt the last message is left open, to be continued."""
        if not self._opening:
            raise InputError(f"the tokenizer of {self.name} has no chat tokens: leave --apply_chat_template out")
        ids, _ = self.tokenizer.render_conversation({"messages": chat_history}, max_tokens=1 << 40)
        if add_generation_prompt:
            ids.append(self.tokenizer.encode_special(chat_format.ASSISTANT_START))
        elif chat_history[-1]["role"] == "assistant":
            ids.pop()
        return self.tokenizer.decode(ids)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What identifies the rendering in the harness's records."""
        return "nanochat_jax.conversation"

    @property
    def tokenizer_name(self) -> str:
        """What identifies the tokenizer in the harness's cache."""
        return f"nanochat_jax-{self.tokenizer.hash[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {"model": self.name, "tokenizer": self.tokenizer.hash}


def main() -> int:
    """The harness's own command line, with our model chosen; returns the exit status."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    if not any(a == "--model" or a.startswith("--model=") or a == "-M" for a in sys.argv[1:]):
        sys.argv[1:] = ["run", "--model", NAME, *(a for a in sys.argv[1:] if a != "run")]

    def action() -> None:
        cli_evaluate()

    return errors.exit_status(action)


if __name__ == "__main__":
    sys.exit(main())
