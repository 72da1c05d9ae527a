"""Talking to a model in the terminal. A base model completes text; a chat model holds a conversation.

python -m scripts.chat                        talk (or pipe prompts in, one a line)
python -m scripts.chat -p "The sea is"        answer once and exit (-p - reads the prompt from standard input)
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from nanochat_jax.terminal.commands import Leave
from nanochat_jax.terminal.console import Message, Screen, ask, converse, line_editing, read_message
from nanochat_jax.terminal.session import Chat, ChatSettings
from nanochat_jax.utils import errors, flags
from nanochat_jax.utils.errors import UserError

TRY_CHAT = """\
Try:  Who are you?   What is 12 + 30?   How many r are in carrot?   What does a cow eat?
      (<12+30=42> in an answer: the model asked the calculator, which said 42)
Then: /regen for another answer, /temperature 0 for the most likely one, Ctrl-C to stop a long one."""
TRY_BASE = """\
This is a base model: it continues whatever text you begin and was not trained to answer questions.
Try:  The sky is   |   Once upon a time   |   /temperature 1 for surprises, /regen for another ending."""


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status (0 fine, 1 no model or a prompt that does not fit, 2 bad flags,
    3 a GPU that JAX cannot use, 130 interrupted)."""
    settings = flags.parse(ChatSettings, argv, (__doc__ or "").split("\n\n")[0], echo=False)
    closed = [name for name in ("stdin", "stdout") if getattr(sys, name) is None]
    from nanochat_jax.hardware import devices

    def action() -> int:
        if "stdout" in closed:
            raise UserError("standard output is closed: there is nowhere to write an answer")
        if "stdin" in closed and settings.prompt in (None, "-"):
            raise UserError('standard input is closed: give a prompt with -p="some text"')
        try:
            return _run(_with_prompt(settings))
        except Leave:
            return errors.INTERRUPTED

    # a reader (head, a pager) that has seen enough is no failure
    return errors.exit_status(action, {devices.DeviceError: devices.NO_USABLE_GPU, BrokenPipeError: 0})


def _with_prompt(settings: ChatSettings) -> ChatSettings:
    """The settings with the prompt's text: what is read from standard input, bytes that are no text replaced."""
    if settings.prompt == "-":
        text = _read(sys.stdin.read).rstrip("\n")
    else:
        text = settings.prompt and settings.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    try:
        return replace(settings, prompt=text)
    except ValueError as error:
        flags.fail(str(error))


def _read(read: Callable[[], str]) -> str:
    """What is read from standard input, a byte-order mark removed."""
    try:
        return read().removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"standard input cannot be read: {error.strerror}") from error


def _run(settings: ChatSettings) -> int:
    # JAX takes a second to import: flags are judged before
    from nanochat_jax.hardware import devices
    from nanochat_jax.inference.engine import Engine
    from nanochat_jax.runs.checkpoint import chosen, load_model

    talking = settings.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if talking:
        print("Loading ...", end="", flush=True)
    try:
        devices.prepare(settings.device)
        devices.check(settings.device)
        run = settings.run or settings.model_tag
        config, params, tokenizer, meta = load_model(run, settings.stage, settings.step)
    except Exception:
        if talking:
            print()  # what is said of it gets a line of its own
        raise
    engine = Engine(config, params, tokenizer, slots=1)
    chat = Chat(engine, tokenizer, settings, completing=meta["stage"] == "base")
    screen = Screen(sys.stdout, sys.stdout.isatty())
    model, others = chosen(meta, run, settings.stage)
    if others and not talking:
        print(f"({model}, {others})", file=sys.stderr)
    if settings.prompt is not None:
        answered = ask(chat, screen, settings.prompt)
        if answered and chat.stopping.is_set():
            return 130
        return 0 if answered else 1
    if not talking:
        return 0 if converse(chat, screen, _next_line) else 1
    facts = f"{config.n_layer} layers, width {config.n_embd}, context {engine.capacity} tokens"
    talk(chat, screen, f"\r{model}: {facts}" + (f"\n({others})" if others else ""))
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
    """A line of a file or a pipe is a prompt, whatever it says; one that a person types may be a command."""
    line = _read(sys.stdin.readline)
    if not line:
        raise EOFError
    return Message(line.strip()) if sys.stdin.isatty() else Message(line.removesuffix("\n"), verbatim=True)
