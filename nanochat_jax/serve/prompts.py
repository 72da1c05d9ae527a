"""From the text of a request to the ids of its prompts; what does not fit the model's context is refused here."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from nanochat_jax.serve import schemas, tools
from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.serve.worker import Worker
from nanochat_jax.text.prompts import ContextOverflow, MessageError, chat_prompt, fit_history

T = TypeVar("T")

SHORT_TEXT = 4096  # characters that the event loop tokenizes itself: half a millisecond, ten times what a thread costs


async def of_conversation(
    worker: Worker, body: schemas.ChatRequest, max_tokens: int, however_long: bool = False
) -> list[int]:
    """A conversation's ids. With `truncate_history` its oldest exchanges are dropped where it is too long (and enough
    of the context left for a completion: max_tokens, at most half of it).

    Raises ApiError for a conversation that has no prompt, or (unless however_long) none that fits the context.
    """
    tokenizer, capacity = worker.tokenizer, worker.engine.capacity
    said = [m.model_dump(include={"role", "content", "tool_calls", "tool_call_id"}) for m in body.messages]
    try:
        messages = tools.folded(said)
    except MessageError as error:
        raise _named(error) from None
    newest = messages[-1:] if body.truncate_history else messages
    if not however_long:
        _check_length(worker, sum(_characters(m["content"]) for m in newest), "messages")
    characters = sum(_characters(m["content"]) for m in messages)
    ending = _ending(body)
    try:
        if body.truncate_history:
            reserve = min(max_tokens, capacity // 2)
            fit = functools.partial(fit_history, messages, tokenizer, capacity, reserve, **ending)
            return (await _tokenized(characters, fit))[0]
        prompt = await _tokenized(characters, functools.partial(chat_prompt, messages, tokenizer, **ending))
        if len(prompt) > capacity and not however_long:
            raise ContextOverflow(len(prompt), capacity)
        return prompt
    except MessageError as error:
        raise _named(error) from None
    except ContextOverflow as error:
        raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from None


def _named(error: MessageError) -> ApiError:
    if error.index is None:
        return ApiError(400, error.problem, param="messages")
    place = f"messages.{error.index}"
    field = f"{place}.{error.field}" if error.field else place
    return ApiError(400, f"{field}: {error.problem}", param=place)


def _ending(body: schemas.ChatRequest) -> dict[str, bool]:
    """How the prompt is to end, as `chat_prompt` is told. Raises ApiError where the request contradicts itself."""
    resume, prime = body.continue_final_message, body.add_generation_prompt
    if resume and prime:
        message = (
            "continue_final_message and add_generation_prompt cannot both be true: either the last message goes on, "
        )
        raise ApiError(400, message + "or another one begins", param="continue_final_message")
    if resume and body.messages[-1].role not in ("assistant", "tool"):
        message = "continue_final_message: the last message must be the assistant's to be continued"
        raise ApiError(400, message, param="continue_final_message")
    return {"resume": (not prime) if resume is None else resume, "prime": prime is not False}


async def of_texts(worker: Worker, body: schemas.CompletionRequest) -> list[list[int]]:
    """The ids of each prompt: of a text with bos before it, or those given. Raises ApiError for one that cannot be."""
    given: Any = body.prompt
    capacity, vocab_size = worker.engine.capacity, worker.engine.config.vocab_size
    prompts = []
    for text in [""] if given is None else [given] if isinstance(given, str) or _is_ids(given) else given:
        if isinstance(text, str):
            _check_length(worker, len(text), "prompt")
            ids = [worker.tokenizer.bos_id, *await encoded(worker, text)]
        else:
            ids = text
            if max(ids) >= vocab_size:
                message = f"the prompt holds id {max(ids)}; the vocabulary has 0 to {vocab_size - 1}"
                raise ApiError(400, message, param="prompt")
        if len(ids) > capacity:
            message = str(ContextOverflow(len(ids), capacity)).replace("messages", "prompt")
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")
        prompts.append(ids)
    return prompts


async def encoded(worker: Worker, text: str) -> list[int]:
    """A text's ids, nothing before them."""
    return await _tokenized(len(text), functools.partial(worker.tokenizer.encode_text, text))


def as_texts(worker: Worker, body: schemas.CompletionRequest, prompts: list[list[int]]) -> list[tuple[str, int]]:
    """Each prompt as it is echoed: (text, how many tokens the server put before it). Special ids have no text."""
    given: Any = body.prompt
    if given is None or isinstance(given, str):
        return [(given or "", 1)]
    if isinstance(given[0], str):
        return [(text, 1) for text in given]
    ordinary = len(worker.tokenizer.ranks)
    return [(worker.tokenizer.decode([token for token in ids if token < ordinary]), 0) for ids in prompts]


def _is_ids(prompt: Any) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


def _characters(content: str | list[str | dict] | None) -> int:
    if content is None or isinstance(content, str):
        return len(content or "")
    return sum(len(part if isinstance(part, str) else part["text"]) for part in content)


def _check_length(worker: Worker, characters: int, param: str) -> None:
    """Refuses a text that is certain not to fit the context before the tokenizer sees it: its split pattern cannot take
    a megabyte of everything."""
    least, capacity = characters // worker.longest_token, worker.engine.capacity
    if least > capacity:
        message = f"this model's context is {capacity} tokens, but the {param} have at least {least}; shorten them"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    if characters > schemas.MAX_TEXT:
        raise ApiError(400, f"the {param} have {characters} characters, more than {schemas.MAX_TEXT}", param=param)


async def _tokenized(characters: int, function: Callable[[], T]) -> T:
    """What `function` makes of a text of so many characters; a long one on another thread, as it takes a tenth of a
    second."""
    if characters <= SHORT_TEXT:
        return function()
    return await asyncio.to_thread(function)
