"""One conversation with one model: exchanges, undoing them, saving them. Knows nothing of the screen."""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.text import chat_format
from nanochat_jax.text.detokenizer import CompletionStream, Piece, as_text
from nanochat_jax.text.prompts import ContextOverflow, MessageError, alternating, chat_prompt
from nanochat_jax.utils import paths
from nanochat_jax.utils.errors import InputError
from nanochat_jax.utils.flags import flag


@dataclass(frozen=True)
class ChatSettings:
    """The flags of scripts.chat; defaults as the reference's."""

    prompt: str | None = flag(None, "answer this once and exit; - reads it from standard input", short="p")
    run: str | None = flag(None, "the run to talk to; default: the newest")
    model_tag: str | None = flag(None, "another name for --run", short="g")
    stage: str | None = flag(None, "the newest run of this stage (base, ...)", short="i")
    step: int | None = flag(None, "a checkpoint's step; default: the run's newest", short="s")
    temperature: float = flag(0.6, "0 = always the most likely token", short="t")
    top_k: int = flag(50, "sample among the k most likely tokens, 0 = all", short="k")
    top_p: float = flag(1.0, "sample among the most likely tokens that together have this probability, 1 = all")
    min_p: float = flag(0.0, "sample among the tokens at least so many times as likely as the likeliest, 0 = all")
    repetition_penalty: float = flag(1.0, "above 1: what has been said is less likely to be said again")
    frequency_penalty: float = flag(0.0, "the same, for each time that it was said in this answer; -2 to 2")
    presence_penalty: float = flag(0.0, "the same, once; -2 to 2")
    max_tokens: int = flag(256, "the longest answer, in tokens")
    seed: int = flag(42, "the same seed and conversation give the same answer")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "gpu"))

    def __post_init__(self):
        self.sampling()
        if self.prompt is not None and not self.prompt.strip():
            raise InputError('the prompt is empty: -p "some text", or -p - to read it from standard input')
        if self.run and self.model_tag and self.run != self.model_tag:
            raise InputError(f"--run={self.run} and --model_tag={self.model_tag} are two names for one thing: give one")

    def sampling(self) -> SamplingParams:
        """How answers are sampled. Raises ValueError, naming the field."""
        names = "max_tokens temperature top_k top_p seed min_p repetition_penalty frequency_penalty presence_penalty"
        return SamplingParams(**{name: getattr(self, name) for name in names.split()})


@dataclass(frozen=True)
class Turn:
    """An exchange: the question, the answer as shown, both as the tokens that the model read and wrote."""

    question: str
    pieces: list[Piece]
    tokens: list[int]


@dataclass(frozen=True)
class Reply:
    """How an answer went. reason: "end" (the model finished), "length" (max_tokens), "cancelled"; n_tokens of answer;
    seconds from the question to the end; dropped: old exchanges that no longer fitted; context: tokens in use."""

    reason: str
    n_tokens: int
    seconds: float
    dropped: int
    context: int


class Chat:
    """One conversation, or (completing: a base model) one completion after another.

    Earlier answers stay as the tokens that were generated, so the engine finds them in its cache.
    """

    def __init__(self, engine, tokenizer, settings: ChatSettings, completing: bool):
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.completing = completing
        self.turns: list[Turn] = []
        self.last: Reply | None = None
        self.stopping = threading.Event()
        self.path: Path | None = None  # where this conversation was saved or loaded
        self.asked = ""  # the newest question
        self._again = 0  # how often it was answered anew

    def answer(self, question: str, show: Callable[[Sequence[Piece]], object]) -> Reply:
        """Answers a message (or continues a text), giving the pieces to `show` as they come.

        Set `stopping` to end it early (and clear it before the next): what has been said stays part of the
        conversation. Raises ContextOverflow for a text that does not fit the model's context, MessageError for a
        tokenizer that cannot chat.
        """
        self.asked, self._again = question, 0
        return self._run(question, show)

    def regenerate(self, show: Callable[[Sequence[Piece]], object]) -> Reply:
        """Another answer to the newest question, from another seed. Raises ValueError where there is no question."""
        if not self.asked:
            raise InputError("there is no question to answer again yet")
        self._again += 1
        replaced = self.turns.pop() if self.turns and self.turns[-1].question == self.asked else None
        before = list(self.turns)
        try:
            outcome = self._run(self.asked, show)
        except BaseException:
            self.turns = before + ([replaced] if replaced else [])
            raise
        if not outcome.n_tokens and replaced:  # stopped before it said anything: the old answer stays
            self.turns.append(replaced)
        return outcome

    def _run(self, question: str, show: Callable[[Sequence[Piece]], object]) -> Reply:
        began, s = time.monotonic(), self.settings
        prompt, opening, dropped = self._prompt(question)
        longest = self.engine.capacity - len(prompt) + 1
        params = replace(s.sampling(), max_tokens=min(s.max_tokens, longest), seed=s.seed + self._again)
        request = self.engine.submit(prompt, params)
        stream = CompletionStream(self.tokenizer)
        try:
            while request.finished is None:
                for event in self.engine.step():
                    show(stream.push(event.tokens))
                if self.stopping.is_set():
                    self.engine.cancel(request)
        finally:
            self.engine.cancel(request)
        show(stream.finish())
        if not self.completing and request.tokens:
            body = request.tokens[:-1] if request.finished == "end" else request.tokens
            end = self.tokenizer.encode_special(chat_format.ASSISTANT_END)
            self.turns.append(Turn(question, stream.pieces, [*opening, *body, end]))
        n = len(request.tokens)
        self.last = Reply(request.finished or "", n, time.monotonic() - began, dropped, len(prompt) + n)
        return self.last

    def _prompt(self, question: str) -> tuple[list[int], list[int], int]:
        """(the prompt, its part for this question, how many exchanges were dropped for it)."""
        capacity = self.engine.capacity
        if self.completing:
            prompt = [self.tokenizer.bos_id, *self.tokenizer.encode_text(question)]
            if len(prompt) > capacity:
                raise ContextOverflow(len(prompt), capacity)
            return prompt, [], 0
        bos, *opening = chat_prompt([{"role": "user", "content": question}], self.tokenizer)
        if 1 + len(opening) > capacity:
            raise ContextOverflow(1 + len(opening), capacity)
        # the oldest exchanges go where the newest message and a fair length of completion would not fit
        wanted = min(self.settings.max_tokens, capacity // 2)
        before = len(self.turns)
        while self.turns and 1 + sum(len(t.tokens) for t in self.turns) + len(opening) + wanted > capacity:
            self.turns.pop(0)
        history = [token for turn in self.turns for token in turn.tokens]
        return [bos, *history, *opening], opening, before - len(self.turns)

    def clear(self) -> None:
        """Forgets the conversation."""
        self.turns, self.asked, self.path, self.last = [], "", None, None

    def undo(self) -> str | None:
        """Forgets the newest exchange and returns its question; None where there is none."""
        if not self.turns:
            return None
        forgotten = self.turns.pop().question
        self.asked = self.turns[-1].question if self.turns else ""
        return forgotten

    def messages(self) -> list[dict[str, str]]:
        """The conversation in the OpenAI shape, tool calls written as `nanochat_jax.text.detokenizer` says."""
        found = []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": as_text(turn.pieces)})
        return found

    def save(self, name: str) -> Path:
        """Writes the conversation as JSON, readable by its owner only; returns the path.

        name: a name (kept in the base directory) or a path. Raises ValueError for an empty conversation and for a file
        that some other conversation is in.
        """
        if not self.turns:
            raise InputError("there is nothing to save yet")
        path = chat_path(name)
        if path.exists() and path != self.path:
            raise InputError(f"{path} exists: choose another name, or delete it first")
        paths.write_atomic(path, json.dumps({"messages": self.messages()}, ensure_ascii=False, indent=1) + "\n")
        os.chmod(path, 0o600)
        self.path = path
        return path

    def load(self, name: str) -> Path:
        """Takes up a saved conversation in place of the present one; returns its path.

        Takes any JSON object with "messages" in the OpenAI shape (or the list alone). Raises ValueError, naming the
        file, where it cannot; the present conversation stays then.
        """
        path = chat_path(name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            turns = self._turns_of(content["messages"] if isinstance(content, dict) else content)
        except FileNotFoundError:
            names = saved_chats()
            raise InputError(f"there is no {path}; saved are: {', '.join(names) or 'none'}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no conversation ({type(error).__name__}: {error})") from None
        self.turns, self.path, self.last = turns, path, None
        self.asked, self._again = turns[-1].question, 0
        return path

    def _turns_of(self, messages: Any) -> list[Turn]:
        if not isinstance(messages, list):
            raise MessageError("there are no messages")
        system, alternate = alternating(messages)
        if len(alternate) % 2:
            raise MessageError("the last message must be the assistant's", len(messages) - 1)
        turns = []
        for question, completion in zip(alternate[::2], alternate[1::2], strict=True):
            head = [{"role": "system", "content": system}, question]
            opening = chat_prompt(head, self.tokenizer)[1:]
            end = self.tokenizer.encode_special(chat_format.ASSISTANT_END)
            tokens = [*chat_prompt([*head, completion], self.tokenizer)[1:], end]
            stream = CompletionStream(self.tokenizer)
            stream.push(tokens[len(opening) :])
            stream.finish()
            asked = "\n\n".join(filter(None, [system, question["content"]]))
            turns.append(Turn(asked, stream.pieces, tokens))
            system = ""
        return turns


def chats_dir() -> Path:
    """Where named conversations are kept: for the owner's eyes only."""
    folder = paths.base_dir() / "chats"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def chat_path(name: str) -> Path:
    """A name's file in `chats_dir`; what looks like a path (a slash, .json at the end) is one."""
    name = name.strip()
    if not name:
        raise InputError("give a name, such as: /save monday")
    if "/" in name or name.endswith(".json"):
        return Path(os.path.expanduser(name)).absolute()
    return chats_dir() / f"{name}.json"


def saved_chats() -> list[str]:
    """Names of the conversations in `chats_dir`, the newest first."""
    files = sorted(chats_dir().glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    return [p.stem for p in files]
