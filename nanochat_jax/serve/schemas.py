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

from nanochat_jax.inference.request import MAX_LOGPROBS, SamplingParams

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
Penalty = Annotated[Float, Field(ge=-2, le=2)] | None
Zero = Annotated[Float, Field(ge=0, le=0)] | None
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow")


class Part(Body):
    """A part of a message. python and python_output (assistant messages only): a call of the calculator, its result."""

    type: Annotated[str, AfterValidator(_kind_of_part)] = Field("text", examples=["text", "python", "python_output"])
    text: Str


class CalledFunction(Body):
    name: Name
    arguments: Str


class CalledTool(Body):
    """A call of the calculator that the client computed."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """Keys that it does not know are ignored; `content` may be null in an assistant's message only."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Str | Annotated[list[Str | Part], Field(max_length=MAX_MESSAGES)] | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=100)] | None = None
    tool_call_id: Name | None = Field(None, description="of a tool's message: which call this is the result of")
    function_call: None = None
    name: Any = Field(None, description="ignored")
    refusal: Any = Field(None, description="ignored")
    audio: Any = Field(None, description="ignored")
    annotations: Any = Field(None, description="ignored")
    parts: Any = Field(None, description="ignored, so that an answer can be sent back as it came")


class StreamOptions(Body):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = Field(None, description="ignored")


JsonSchema = dict[str, Any] | bool | str
GrammarText = Annotated[str, Field(max_length=1 << 16)]
Choice = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)]


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class NamedSchema(Body):
    name: Name | None = None
    schema_: JsonSchema | None = Field(None, alias="schema")
    description: str | None = None
    strict: StrictBool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Body):
    json_: JsonSchema | None = Field(None, alias="json")
    regex: GrammarText | None = None
    choice: Choice | None = None
    grammar: GrammarText | None = None
    json_object: StrictBool | None = None


# fields of a request that are called alike in `SamplingParams`
_SAMPLING: Any = set("max_tokens temperature top_k top_p min_p seed".split())
_SAMPLING |= {"frequency_penalty", "presence_penalty", "repetition_penalty"}


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
    min_p: Annotated[Float, Field(ge=0, le=1)] | None = Field(
        None,
        description="extension: sample among the tokens at least so many times as likely as the likeliest, 0 = all",
    )
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    repetition_penalty: Annotated[Float, Field(gt=0)] | None = Field(
        None, description="extension: what the logits of tokens that the prompt or the completion has are divided by"
    )
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Float] | None = Field(
        None, description="token id: what its logit gains, -100 to 100 (what lies beyond counts as these)"
    )
    response_format: ResponseFormat | None = Field(None, description="what the completion must follow: JSON, a schema")
    structured_outputs: StructuredOutputs | None = Field(None, description="extension: the same, as vLLM says it")
    guided_json: JsonSchema | None = Field(None, description="its older names")
    guided_regex: GrammarText | None = None
    guided_choice: Choice | None = None
    guided_grammar: GrammarText | None = None
    user: Name | None = Field(None, description="ignored")
    metadata: dict[str, Any] | None = Field(None, description="ignored")

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """What the request asks for, `defaults` where it does not say; without a seed, a new one."""
        asked = {"seed": secrets.randbits(31), **self.model_dump(include=_SAMPLING, exclude_none=True)}
        if self.top_k == -1:  # as vLLM writes 0
            asked["top_k"] = 0
        if "max_tokens" in asked:  # 0 asks for the prompt alone, but the engine always goes one step
            asked["max_tokens"] = max(1, asked["max_tokens"])
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "repetition_penalty" in asked:
            asked["repetition_penalty"] = max(1e-3, min(1e3, asked["repetition_penalty"]))
        bias = tuple((int(token), max(-100.0, min(100.0, value))) for token, value in (self.logit_bias or {}).items())
        return replace(defaults, **asked, stop=stop, logit_bias=bias)


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
    tools: Annotated[list[Tool], Field(max_length=128)] | None = Field(
        None, description="the calculator, where the client is to compute; other tools are refused"
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="alternatives of each token; needs logprobs"
    )
    safety_identifier: Name | None = Field(None, description="ignored")
    prompt_cache_key: Name | None = Field(None, description="ignored: common prefixes of prompts are found without it")

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """As every request's; `max_completion_tokens` is the newer name of `max_tokens`."""
        params = super().sampling(replace(defaults, logprobs=(self.top_logprobs or 0) if self.logprobs else None))
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
    max_tokens: Annotated[Int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="as for a chat; 0 with echo: the prompt alone"
    )
    echo: StrictBool | None = None
    suffix: Literal[""] | None = None
    best_of: Annotated[Int, Field(ge=1)] | None = Field(None, description="1 or n; more is refused")
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="alternatives of each token, of the prompt's too where it is echoed"
    )

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """As every request's, but short where max_tokens is left out, as OpenAI's."""
        params = super().sampling(replace(defaults, max_tokens=COMPLETION_TOKENS))
        return replace(params, logprobs=self.logprobs, prompt_logprobs=self.logprobs if self.echo else None)


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
    content: str | None
    refusal: None
    parts: list[Part]
    tool_calls: list[CalledTool] | None = None


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ContentLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ContentLogprobs | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TokensLogprobs(BaseModel):
    """Lists of equal length; the first token of a prompt that is echoed has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: TokensLogprobs | None


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
    """A served model; the last six fields are extensions. max_model_len: context_length, as vLLM calls it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    stage: str
    step: int
    context_length: int
    max_model_len: int
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
