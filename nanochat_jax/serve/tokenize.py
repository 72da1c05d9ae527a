"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, StrictBool

from nanochat_jax.serve import prompts, schemas
from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.serve.openai import check_model, worker_of
from nanochat_jax.text import chat_format

router = APIRouter()

_REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"model": schemas.Error, "description": "what cannot be tokenized; param names the field"},
    404: {"model": schemas.Error, "description": "no such model"},
}


class TokenizeRequest(schemas.Body):
    """A text, or a conversation as /v1/chat/completions takes it."""

    model: schemas.Name | None = None
    prompt: schemas.Str | None = Field(
        None, description="a text; one that is the name of a special token, alone, is that token"
    )
    messages: Annotated[list[schemas.ChatMessage], Field(min_length=1, max_length=schemas.MAX_MESSAGES)] | None = None
    add_special_tokens: StrictBool | None = Field(None, description="of a text: a bos token before it; default true")
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    return_token_strs: StrictBool | None = None


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(schemas.Body):
    model: schemas.Name | None = None
    tokens: Annotated[list[Annotated[schemas.Int, Field(ge=0, lt=1 << 31)]], Field(max_length=schemas.MAX_TOKENS)]


class DetokenizeResponse(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What lm-eval's remote tokenizer asks for, and what else a client may want to know."""

    tokenizer_class: str
    vocab_size: int
    bos_token: str
    eos_token: str
    special_tokens: dict[str, int]
    model_max_length: int


@router.post("/tokenize", response_model=TokenizeResponse, responses=_REFUSED)
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The ids of a text, or of the prompt that a conversation becomes, however long."""
    worker = worker_of(request)
    check_model(body.model, worker.model)
    tokenizer = worker.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either a prompt or messages", param="prompt")
    if body.messages is not None:
        how = {"add_generation_prompt": body.add_generation_prompt}
        how["continue_final_message"] = body.continue_final_message or None  # vLLM's default is false
        chat = schemas.ChatRequest(messages=body.messages, **how)  # type: ignore[arg-type]
        tokens = await prompts.of_conversation(worker, chat, 1, however_long=True)
    elif body.prompt in tokenizer.special_tokens:
        tokens = [tokenizer.special_tokens[body.prompt]]
    else:
        tokens = await prompts.encoded(worker, body.prompt or "")
        if body.add_special_tokens is not False:
            tokens = [tokenizer.bos_id, *tokens]
    names = [tokenizer.decode([token]) for token in tokens] if body.return_token_strs else None
    context = worker.engine.capacity
    return {"count": len(tokens), "max_model_len": context, "tokens": tokens, "token_strs": names}


@router.post("/detokenize", response_model=DetokenizeResponse, responses=_REFUSED)
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """The text of ids, special tokens as their names."""
    worker = worker_of(request)
    check_model(body.model, worker.model)
    size = worker.tokenizer.vocab_size
    if body.tokens and max(body.tokens) >= size:
        message = f"tokens: there is no token {max(body.tokens)}; the vocabulary has 0 to {size - 1}"
        raise ApiError(400, message, param="tokens")
    return {"prompt": worker.tokenizer.decode(body.tokens)}


@router.get("/tokenizer_info", response_model=TokenizerInfo)
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """Which tokenizer this is."""
    worker = worker_of(request)
    special, bos = worker.tokenizer.special_tokens, worker.tokenizer.decode([worker.tokenizer.bos_id])
    return {
        "tokenizer_class": "nanochat_jax",
        "vocab_size": worker.tokenizer.vocab_size,
        "bos_token": bos,
        "eos_token": chat_format.ASSISTANT_END if chat_format.ASSISTANT_END in special else bos,
        "special_tokens": special,
        "model_max_length": worker.engine.capacity,
    }
