"""Talking to a model in the terminal. A base model completes text; a chat model holds a conversation.

python -m scripts.chat                        talk (or pipe prompts in, one a line)
python -m scripts.chat -p "The sea is"        answer once and exit (-p - reads the prompt from standard input)
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from nanochat_jax import cli
from nanochat_jax.terminal.commands import Leave
from nanochat_jax.terminal.console import Message, Screen, ask, converse, line_editing, read_message
from nanochat_jax.terminal.session import Chat, ChatSettings

TRY_CHAT = """\
Try:  Who are you?   What is 12 + 30?   How many r are in carrot?   What does a cow eat?
      (<12+30=42> in an answer: the model asked the calculator, which said 42)
Then: /regen for another answer, /temperature 0 for the likeliest one, Ctrl-C to stop a long one."""
TRY_BASE = """\
This is a base model: it continues whatever text you begin and has not learnt to answer questions.
Try:  The sky is   |   Once upon a time   |   /temperature 1 for surprises, /regen for another ending."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status (0 fine, 1 no model or a prompt that does not fit, 2 bad flags,
    3 a GPU that JAX cannot use, 130 interrupted)."""
    try:
        settings = cli.parse(ChatSettings, argv, (__doc__ or "").split("\n\n")[0], echo=False)
        settings = _with_prompt(settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        return _run(settings)
    except (KeyboardInterrupt, Leave):
        return 130
    except BrokenPipeError:  # the reader (head, a pager) has seen enough
        # what is left in the buffer has nowhere to go; without this Python complains about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _with_prompt(settings: ChatSettings) -> ChatSettings:
    if settings.prompt != "-":
        return settings
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    return replace(settings, prompt=sys.stdin.read().rstrip("\n"))


def _run(settings: ChatSettings) -> int:
    # JAX takes a second to import: flags are judged before
    from nanochat_jax import devices
    from nanochat_jax.checkpoint import CheckpointError, load_model
    from nanochat_jax.engine import Engine

    talking = settings.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if talking:
        print("Loading ...", end="", flush=True)
    try:
        devices.prepare(settings.device)
        devices.check(settings.device)
        config, params, tokenizer, meta = load_model(settings.run or settings.model_tag, settings.stage, settings.step)
    except (ValueError, OSError, CheckpointError, devices.DeviceError) as error:
        print("\r" * talking + f"error: {error}", file=sys.stderr)
        return devices.NO_USABLE_GPU if isinstance(error, devices.DeviceError) else 1
    engine = Engine(config, params, tokenizer, slots=1)
    chat = Chat(engine, tokenizer, settings, completing=meta["stage"] == "base")
    screen = Screen(sys.stdout, sys.stdout.isatty())
    if settings.prompt is not None:
        if sys.stderr.isatty():
            print(f"({meta['run']}, step {meta['step']})", file=sys.stderr)
        answered = ask(chat, screen, settings.prompt)
        if answered and chat.stopping.is_set():
            return 130
        return 0 if answered else 1
    if not talking:
        return 0 if converse(chat, screen, _next_line) else 1
    facts = f"{config.n_layer} layers, width {config.n_embd}, context {engine.capacity} tokens"
    talk(chat, screen, f"\r{meta['run']}, stage {meta['stage']}, step {meta['step']}: {facts}")
    return 0


def talk(chat: Chat, screen: Screen, headline: str) -> None:
    """A conversation with a person at a terminal."""
    print(headline)
    with line_editing() as first:
        if first or chat.completing:
            print(TRY_BASE if chat.completing else TRY_CHAT)
        print("/help for commands, /quit to leave.")
        label = "> " if chat.completing else "User: "

        def read_line(continuing: str) -> str:
            if not continuing:
                print()
            return input(continuing.rjust(len(label) - 1) + " " if continuing else label)

        converse(chat, screen, lambda: read_message(read_line))


def _next_line() -> Message:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return Message(line.strip())
