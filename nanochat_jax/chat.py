"""Talking to a model in the terminal. A base model completes text; a chat model holds a conversation.

python -m scripts.chat                        talk (or pipe prompts in, one a line)
python -m scripts.chat -p "The sea is"        answer once and exit
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TextIO

from nanochat_jax import cli, conversation
from nanochat_jax.cli import flag

HELP = """\
  /temperature X   how adventurous: 0 = always the likeliest token, 1 = as the model believes (now {temperature:g})
  /topk N          choose among the N likeliest tokens, 0 = all (now {top_k})
  /maxtokens N     the longest answer, in tokens (now {max_tokens})
  /seed N          another number, another answer (now {seed})
  /clear           forget the conversation          /quit   leave (also: quit, exit, Ctrl-D)
  Ctrl-C           stop the answer"""

# How the calculator's tokens look on the screen: "12+30" and its answer become <12+30=42>.
_SHOWN = {
    conversation.PYTHON_START: "<",
    conversation.PYTHON_END: "",
    conversation.OUTPUT_START: "=",
    conversation.OUTPUT_END: ">",
    conversation.ASSISTANT_END: "",
    conversation.BOS: "",
}


@dataclass(frozen=True)
class ChatSettings:
    """The flags of scripts.chat; defaults as the reference's."""

    prompt: str | None = flag(None, "answer this once and exit", short="p")
    run: str | None = flag(None, "the run to talk to; default: the newest")
    model_tag: str | None = flag(None, "another name for --run", short="g")
    stage: str | None = flag(None, "the newest run of this stage (base, ...)", short="i")
    step: int | None = flag(None, "a checkpoint's step; default: the run's newest", short="s")
    temperature: float = flag(0.6, "0 = always the likeliest token", short="t")
    top_k: int = flag(50, "choose among the k likeliest tokens, 0 = all", short="k")
    max_tokens: int = flag(256, "the longest answer, in tokens")
    seed: int = flag(42, "the same seed and prompt give the same answer")

    def __post_init__(self):
        for problem in problems(self):
            raise ValueError(problem)
        if self.run and self.model_tag and self.run != self.model_tag:
            raise ValueError(f"--run={self.run} and --model_tag={self.model_tag} are two names for one thing: give one")


def problems(settings: ChatSettings) -> Iterator[str]:
    """What is wrong with the sampling settings, a sentence each."""
    if not 0 <= settings.temperature < float("inf"):
        yield f"temperature must be a number of at least 0, got {settings.temperature:g}"
    if settings.top_k < 0:
        yield f"top_k must be at least 0 (0 = all tokens), got {settings.top_k}"
    if settings.max_tokens < 1:
        yield f"max_tokens must be at least 1, got {settings.max_tokens}"


class Chat:
    """One conversation, or one completion after another, written to `out` as it comes.

    engine is an `nanochat_jax.engine.Engine`; completing: the model is a base model, every prompt stands alone.
    """

    def __init__(self, engine, tokenizer, settings: ChatSettings, completing: bool, out: TextIO):
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.completing, self.out = completing, out
        self.shown = {}
        for name, text in _SHOWN.items():
            with contextlib.suppress(KeyError):  # a stock tokenizer has no chat tokens
                self.shown[tokenizer.encode_special(name)] = text
        self.turns: list[list[int]] = []  # user message and answer of each exchange, as tokens
        self.stopping = threading.Event()

    def answer(self, text: str) -> str:
        """Streams the answer to a message (or the continuation of a text) and returns it; why it stopped comes last.

        Set `stopping` (as Ctrl-C does) to end it early: what has been said stays part of the conversation. Raises
        ValueError for a text that does not fit the model's context.
        """
        prompt, turn = self._complete(text) if self.completing else self._converse(text)
        room = self.engine.capacity - len(prompt) + 1
        self.stopping.clear()
        request = self.engine.submit(
            prompt,
            min(self.settings.max_tokens, room),
            self.settings.temperature,
            self.settings.top_k,
            self.settings.seed,
        )
        decoder = self.tokenizer.stream_decoder()
        said = []
        try:
            while request.finished is None:
                for event in self.engine.step():
                    said.append(self._show(decoder, event.tokens))
                if self.stopping.is_set():
                    self.engine.cancel(request)
        finally:
            self.engine.cancel(request)
        said.append(self._show(decoder, None))
        if not self.completing:
            end = self.tokenizer.encode_special(conversation.ASSISTANT_END)
            body = request.tokens[:-1] if request.finished == "end" else request.tokens
            self.turns.append(turn + body + [end])
        self.reason = request.finished
        return "".join(said)

    def clear(self) -> None:
        """Forgets the conversation."""
        self.turns = []

    def _complete(self, text: str) -> tuple[list[int], list[int]]:
        prompt = [self.tokenizer.bos_id, *self.tokenizer.encode_text(text)]
        self._check_room(prompt)
        return prompt, []

    def _converse(self, text: str) -> tuple[list[int], list[int]]:
        special = self.tokenizer.encode_special
        turn = [special(conversation.USER_START), *self.tokenizer.encode_text(text), special(conversation.USER_END)]
        turn.append(special(conversation.ASSISTANT_START))
        bos = self.tokenizer.bos_id
        self._check_room([bos, *turn])
        wanted = min(self.settings.max_tokens, self.engine.capacity // 2)
        # the oldest exchanges make room for the newest message and a fair length of answer
        while self.turns and 1 + sum(map(len, self.turns)) + len(turn) + wanted > self.engine.capacity:
            self.turns.pop(0)
        return [bos, *(token for old in self.turns for token in old), *turn], turn

    def _check_room(self, prompt: list[int]) -> None:
        if len(prompt) > self.engine.capacity:
            raise ValueError(
                f"that is {len(prompt)} tokens, but this model reads {self.engine.capacity} at a time: shorten it"
            )

    def _show(self, decoder, tokens: Sequence[int] | None) -> str:
        """Writes the text that more tokens complete (None: what an unfinished character left)."""
        pieces = [decoder.flush()] if tokens is None else []
        for token in tokens or ():
            if token in self.shown:
                pieces += [decoder.flush(), self.shown[token]]
            else:
                pieces.append(decoder.push(token))
        text = "".join(pieces)
        self.out.write(text)
        self.out.flush()
        return text


def command(chat: Chat, line: str) -> str | None:
    """Obeys a line that is a command and returns what to say; None if it is not one. Raises EOFError to leave."""
    lowered = line.lower()
    if lowered in ("quit", "exit", "/quit", "/exit"):
        raise EOFError
    if lowered in ("clear", "/clear"):
        chat.clear()
        return "Conversation cleared."
    if not line.startswith("/"):
        return None
    name, _, value = lowered[1:].partition(" ")
    if name in ("help", "?"):
        s = chat.settings
        return HELP.format(temperature=s.temperature, top_k=s.top_k, max_tokens=s.max_tokens, seed=s.seed)
    kinds = {"temperature": float, "topk": int, "top_k": int, "maxtokens": int, "max_tokens": int, "seed": int}
    if name not in kinds:
        return f"There is no command /{name}; /help lists them."
    field = {"topk": "top_k", "maxtokens": "max_tokens"}.get(name, name)
    try:
        chat.settings = replace(chat.settings, **{field: kinds[name](value)})
    except ValueError as error:
        return str(error) if value and "literal" not in str(error) else f"/{name} needs a number, such as /{name} 1"
    return f"{field} is {getattr(chat.settings, field):g} now."


@contextlib.contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C asks the answer to stop instead of tearing up whatever Python is doing at that moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def converse(chat: Chat, read: Callable[[], str], decorated: bool) -> None:
    """Reads messages and answers until the end of the input. decorated: someone is watching a terminal."""

    def say(text: str) -> None:
        chat.out.write(text)
        chat.out.flush()

    while True:
        try:
            line = read().strip()
            said = command(chat, line) if line else ""
        except (EOFError, KeyboardInterrupt):
            say("\nGoodbye!\n" if decorated else "")
            return
        if said is not None:
            say(said + "\n" if said else "")
            continue
        if decorated and not chat.completing:
            say("Assistant: ")
        ask(chat, line, decorated)


def ask(chat: Chat, text: str, decorated: bool) -> bool:
    """One prompt and its answer, ended by a newline; False (and the reason on the screen) if it cannot be asked."""
    try:
        with _interrupts(chat.stopping.set):
            if chat.completing:
                chat.out.write(f"\033[1m{text}\033[0m" if decorated else text)
            chat.answer(text)
    except ValueError as error:
        print(f"error: {error}", file=chat.out if decorated else sys.stderr)
        return False
    notes = {"length": "[the longest answer: /maxtokens N]", "cancelled": "[stopped]"}
    chat.out.write(f" \033[2m{notes[chat.reason]}\033[0m\n" if decorated and chat.reason in notes else "\n")
    chat.out.flush()
    return True


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status (0 fine, 1 no model or a prompt that does not fit, 2 bad flags)."""
    try:
        settings = cli.parse(ChatSettings, argv, __doc__ or "", echo=False)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    # JAX takes a second to import: flags are judged before
    from nanochat_jax import devices
    from nanochat_jax.checkpoint import load_model
    from nanochat_jax.engine import Engine

    try:
        devices.prepare()
        config, params, tokenizer, meta = load_model(settings.run or settings.model_tag, settings.stage, settings.step)
    except (ValueError, RuntimeError, OSError) as error:
        if not (type(error).__module__.startswith("nanochat_jax") or isinstance(error, ValueError | FileNotFoundError)):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    completing = meta["stage"] == "base"
    engine = Engine(config, params, tokenizer, slots=1)
    chat = Chat(engine, tokenizer, settings, completing, sys.stdout)
    try:
        return _talk(chat, meta, config)
    except BrokenPipeError:  # the reader (head, a pager) has seen enough
        sys.stderr.close()
        return 0


def _talk(chat: Chat, meta: dict, config) -> int:
    decorated = sys.stdout.isatty()
    if chat.settings.prompt is not None:
        return 0 if ask(chat, chat.settings.prompt, decorated) else 1
    if not (decorated and sys.stdin.isatty()):
        converse(chat, lambda: _next_line(sys.stdin), decorated)
        return 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history
    print(f"{meta['run']}, stage {meta['stage']}, step {meta['step']}: {config.n_layer} layers, width {config.n_embd}")
    if chat.completing:
        print("This is a base model: it continues whatever text you begin. It has not learnt to answer questions.")
    print("/help for commands, /quit to leave.")
    label = "\n> " if chat.completing else "\nUser: "
    converse(chat, lambda: input(label), decorated)
    return 0


def _next_line(stream: TextIO) -> str:
    line = stream.readline()
    if not line:
        raise EOFError
    return line
