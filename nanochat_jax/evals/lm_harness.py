"""EleutherAI's lm-eval harness on our models: its tasks, or local task files, scored by our scorer and engine.

python -m nanochat_jax.evals.lm_harness --model_args run=d20-base --tasks arc_easy
python -m nanochat_jax.evals.lm_harness --model_args run=d20-sft --tasks mine --include_path DIR --apply_chat_template

Needs `pip install lm-eval`; flags are the harness's own. Prompts begin with bos, as documents do in training. What does
not fit the context is counted: the log says so, and the harness's results have it beside the model.
"""

import logging
import re
import sys
from collections import Counter
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
from nanochat_jax.text.detokenizer import CompletionStream
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils import errors
from nanochat_jax.utils.errors import InputError

logger = logging.getLogger(__name__)

NAME = "nanochat_jax"
SLOTS = 8
# Comes before each control token of a rendered chat, which the harness carries about as text: a code point that Unicode
# keeps out of texts. So the name of a control token in a question stays the text that it is.
_MARK = "\ufdd0"
_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in the harness's order


@register_model(NAME)
class NanochatLM(LM):
    """A run as the harness sees it. Build it with `run=...` (as --model_args does) or with `of`.

    max_length: context in tokens, default the model's; longer prompts lose their first tokens. max_gen_toks: the
    longest completion where a task does not say; a prompt that fits the context stays as it is, and its completion ends
    where the context does. `cuts` counts what was lost by both.
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
        self.cuts: Counter[str] = Counter()
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}
        self._marked = re.compile(f"{_MARK}({'|'.join(map(re.escape, tokenizer.special_tokens))}|{_MARK})")

    # --- text to ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, bos first. Only what `apply_chat_template` put there is a control token."""
        if not text.startswith(_MARK + chat_format.BOS):
            return [self.tokenizer.bos_id, *self.tokenizer.encode_text(text)]
        ids: list[int] = []
        plain, *rest = self._marked.split(text)
        for name, following in zip(rest[::2], rest[1::2], strict=True):
            if name == _MARK:  # one that was in a message
                plain += _MARK + following
                continue
            ids += [*self.tokenizer.encode_text(plain), self.tokenizer.special_tokens[name]]
            plain = following
        return [*ids, *self.tokenizer.encode_text(plain)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Context and continuation: encoded together where a token boundary lies between them, else each alone, so that
        no token straddles them. Spaces between them belong to the continuation (the harness's convention).

        Raises ValueError for an empty continuation, which would be likelier than any other.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        before = self.encode(kept) if kept else [self.tokenizer.bos_id]
        chat = kept.startswith(_MARK)
        whole = self.encode(kept + (continuation.replace(_MARK, 2 * _MARK) if chat else continuation))
        joint = whole[: len(before)] == before
        after = whole[len(before) :] if joint else self.tokenizer.encode_text(continuation)
        if not after:
            raise InputError(f"an empty continuation of {context[-60:]!r} cannot be scored: look at the task's choices")
        return before, after

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
        self._count({"contexts": sum(end > self.max_length for _, _, end in items)}, len(items))
        return [(-float(nll.sum(dtype="float64")), greedy) for _, greedy, nll in self._scorer.spans(items)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations up to the first stop string (left out), an end token, or the length; several at a time.

        As a reader sees them: tool calls are <expression=result>, no names of control tokens.
        """
        if self._engine is None:
            self._engine = Engine(self.config, self._params, self.tokenizer, slots=SLOTS, capacity=self.max_length)
        prompts, params, cuts = [], [], Counter({"prompts": 0, "completions": 0})
        capped: list[bool] = []
        asked_before: Counter[tuple[int, ...]] = Counter()
        for request in requests:
            arguments: Any = request.args
            wanted = {key: value for key, value in dict(arguments[1]).items() if value is not None}
            longest = max(1, int(next((wanted[key] for key in _LENGTH_KEYS if key in wanted), self.max_gen_toks)))
            ids = self.encode(arguments[0])
            prompt = self._fitting(ids, longest)
            space = self.max_length - len(prompt) + 1  # a completion's last token needs no position
            cuts["prompts"] += len(prompt) < len(ids)
            capped.append(space < longest)
            stops = wanted.get("until", [])
            params.append(
                SamplingParams(
                    max_tokens=min(longest, space),
                    temperature=float(wanted.get("temperature", 0.0)) if wanted.get("do_sample", True) else 0.0,
                    top_k=int(wanted.get("top_k", 0)),
                    top_p=float(wanted.get("top_p", 1.0)),
                    stop=tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop),
                    sample_index=asked_before[tuple(ids)],  # a task that repeats its questions wants other samples
                )
            )
            asked_before[tuple(ids)] += 1
            prompts.append(prompt)
        completions = self._engine.generate(prompts, params)
        cuts["completions"] = sum(
            c.finish_reason == "length" and cut for c, cut in zip(completions, capped, strict=True)
        )
        self._count(cuts, len(requests))
        return [self._shown(c.tokens, p.stop) for c, p in zip(completions, params, strict=True)]

    def _fitting(self, ids: list[int], longest: int) -> list[int]:
        """The prompt, or where it does not fit the context bos and the end of it, which leave up to half for more."""
        if len(ids) <= self.max_length:
            return ids
        most = self.max_length + 1 - min(longest, self.max_length // 2)
        return [ids[0], *ids[len(ids) - most + 1 :]]

    def _shown(self, tokens: list[int], stops: tuple[str, ...]) -> str:
        stream = CompletionStream(self.tokenizer, stops)
        stream.push(tokens)
        stream.finish()
        return stream.text

    def _count(self, cuts: dict[str, int], requests: int) -> None:
        self.cuts.update(cuts)
        for what, count in cuts.items():
            if count:
                logger.warning(
                    "%d of %d %s were cut: they do not fit a context of %d tokens",
                    count,
                    requests,
                    what,
                    self.max_length,
                )

    # --- chat -------------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, control tokens marked. Without a generation prompt the last message is left open."""
        if chat_format.USER_START not in self.tokenizer.special_tokens:
            raise InputError(f"the tokenizer of {self.name} has no chat tokens: leave --apply_chat_template out")
        texts: list[str] = []

        def note(text: str) -> list[int]:
            texts.append(text.replace(_MARK, 2 * _MARK))
            return [-len(texts)]

        conversation = {"messages": chat_history}
        ids, _ = chat_format.render_conversation(conversation, note, self.tokenizer.encode_special, sys.maxsize)
        if add_generation_prompt:
            ids.append(self.tokenizer.encode_special(chat_format.ASSISTANT_START))
        elif chat_history[-1]["role"] == "assistant":
            ids.pop()
        return "".join(texts[-1 - token] if token < 0 else _MARK + self._names[token] for token in ids)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What identifies the rendering in the harness's records and in its cache of rendered prompts."""
        return "nanochat_jax.conversation.2"

    @property
    def tokenizer_name(self) -> str:
        """What identifies the tokenizer in the harness's cache."""
        return f"nanochat_jax-{self.tokenizer.hash[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results; "cut": how many contexts, prompts and completions."""
        return {"model": self.name, "tokenizer": self.tokenizer.hash, "cut": dict(self.cuts)}


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
