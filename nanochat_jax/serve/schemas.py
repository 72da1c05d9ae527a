"""The bodies of requests and responses. FastAPI checks the former and describes both in /openapi.json.

Types are strict, as OpenAI's are: "5" and true are no numbers. Options that would change a completion and that this
server lacks are accepted only with the value that means they are not used. Fields that it does not know at all are kept
(`model_extra`), so that `ignored` can name them.
"""

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool
from pydantic_core import PydanticCustomError, PydanticKnownError

from nanochat_jax.inference.request import SamplingParams

MAX_MESSAGES = 5000
MAX_TEXT = 1 << 18  # characters of all messages together
MAX_CHOICES = 16  # completions of one request
MAX_TOKENS = 1 << 20
COMPLETION_TOKENS = 16  # of /v1/completions where max_tokens is left out


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise PydanticKnownError("int_type")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise PydanticKnownError("float_type")
    return value


def _truth(value: Any) -> Any:
    if value is not None and not isinstance(value, bool):  # 0.0 equals False, and would pass for it
        raise PydanticKnownError("bool_type")
    return value


def _kind_of_part(value: str) -> str:
    if value not in ("text", "input_text", "output_text", "python", "python_output"):
        message = "this model reads text only: it cannot take a part of type '{kind}'"
        raise PydanticCustomError("other_part", message, {"kind": value[:40]})
    return value


Int = Annotated[int, BeforeValidator(_whole_number)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Str = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=512)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
Off = Annotated[Literal[False], BeforeValidator(_truth)]
Zero = Annotated[Float, Field(ge=0, le=0)] | None
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow")


class Part(Body):
    """A part of a message. python and python_output (assistant messages only): a call of the calculator, its result."""

    type: Annotated[str, AfterValidator(_kind_of_part)] = Field("text", examples=["text", "python", "python_output"])
    text: Str


class ChatMessage(Body):
    """Keys that it does not know are ignored; `content` may be null in an assistant's message only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Str | Annotated[list[Str | Part], Field(max_length=MAX_MESSAGES)] | None = None
    tool_calls: Nothing = None
    function_call: None = None
    name: Any = Field(None, description="ignored")
    refusal: Any = Field(None, description="ignored")
    audio: Any = Field(None, description="ignored")
    annotations: Any = Field(None, description="ignored")
    parts: Any = Field(None, description="ignored, so that an answer can be sent back as it came")


class StreamOptions(Body):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = Field(None, description="ignored")


class TextFormat(Body):
    type: Literal["text"]


class Sampled(Body):
    """What both kinds of completion share."""

    model: Name | None = Field(None, description="the id of /v1/models, which may be left out")
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[Int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    temperature: Annotated[Float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1, le=1 << 31)] | None = Field(
        None, description="extension: sample among the k most likely tokens, 0 or -1 = all"
    )
    max_tokens: Annotated[Int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        None, description="the most tokens to generate; a completion also ends where the context does"
    )
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: Name | None = Field(None, description="ignored")
    metadata: dict[str, Any] | None = Field(None, description="ignored")

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """What the request asks for, `defaults` where it does not say; without a seed, a new one."""
        fields = {"max_tokens", "temperature", "top_k", "top_p", "seed"}
        asked = {"seed": secrets.randbits(31), **self.model_dump(include=fields, exclude_none=True)}
        if self.top_k == -1:  # as vLLM writes 0
            asked["top_k"] = 0
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return replace(defaults, **asked, stop=stop)


class ChatRequest(Sampled):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[Int, Field(ge=1, le=MAX_TOKENS)] | None = None
    continue_final_message: StrictBool | None = Field(
        None, description="as vLLM's: continue the assistant's last message; default: where the last message is its"
    )
    add_generation_prompt: StrictBool | None = Field(
        None, description="as vLLM's: true begins another message after the assistant's last one, false begins none"
    )
    truncate_history: StrictBool | None = Field(
        None, description="extension: drop the oldest exchanges of a conversation that is longer than the context"
    )
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: StrictBool | None = None
    logprobs: Off | None = None
    top_logprobs: Zero = None
    response_format: TextFormat | None = None
    safety_identifier: Name | None = Field(None, description="ignored")
    prompt_cache_key: Name | None = Field(None, description="ignored: common prefixes of prompts are found without it")

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """As every request's; `max_completion_tokens` is the newer name of `max_tokens`."""
        params = super().sampling(defaults)
        return params if self.max_completion_tokens is None else replace(params, max_tokens=self.max_completion_tokens)


Ids = Annotated[list[Annotated[Int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=MAX_TOKENS)]


class CompletionRequest(Sampled):
    prompt: (
        Str
        | Annotated[list[Str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES)]
        | None
    ) = Field(None, description="text (a bos token is put before it), or token ids as they are; or a list of either")
    echo: Off | None = None
    suffix: Literal[""] | None = None
    best_of: Annotated[Int, Field(ge=1, le=1)] | None = None
    logprobs: None = None

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """As every request's, but short where max_tokens is left out, as OpenAI's."""
        return super().sampling(replace(defaults, max_tokens=COMPLETION_TOKENS))


# --- responses --------------------------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None
    parts: list[Part]


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class SamplingDefaults(BaseModel):
    temperature: float
    top_k: int
    max_tokens: int


class ModelInfo(BaseModel):
    """A served model; the last five fields are extensions."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    stage: str
    step: int
    context_length: int
    chat: bool
    defaults: SamplingDefaults


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelInfo]


# What a response's `content` says about server-sent events (OpenAPI 3.2).
EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "required": ["data"],
            "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
        }
    }
}


# --- the server's state -----------------------------------------------------------------------------------------------


class Health(BaseModel):
    """The reference's four fields, and ours. warmed_up: how much of the programs is compiled, 1 when all are; requests
    that come before are answered then."""

    status: Literal["ok", "warming up", "error"]
    ready: bool
    warmed_up: float
    num_gpus: int
    available_workers: int
    model: str
    step: int
    running: int
    waiting: int


class WorkerState(BaseModel):
    gpu_id: int
    device: str


class Stats(BaseModel):
    total_workers: int
    available_workers: int
    busy_workers: int
    workers: list[WorkerState]
