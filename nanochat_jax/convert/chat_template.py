"""The chat template (Jinja) that renders a conversation as `conversation.render_conversation` does.

Libraries render to text first and split that into tokens, special tokens included. So what our rendering can say but
text cannot is refused by the template instead of becoming other tokens: special tokens' names inside a message (they
would turn into the tokens themselves: a prompt injection) and two text parts in a row (they would merge).
"""

import json

from nanochat_jax.text.chat_format import (
    ASSISTANT_END,
    ASSISTANT_START,
    BOS,
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    USER_END,
    USER_START,
)

_TEMPLATE = """\
{%- macro plain(text) -%}
  {%- if text is not string -%}{{- raise_exception('content must be text') -}}{%- endif -%}
  {%- for name in SPECIAL_TOKENS -%}
    {%- if name in text -%}{{- raise_exception('a message must not contain ' + name) -}}{%- endif -%}
  {%- endfor -%}
  {{- text -}}
{%- endmacro -%}
{%- macro only_text(content) -%}
  {%- if content is string -%}
    {{- plain(content) -}}
  {%- elif content is sequence and content | length == 1 and content[0].type == 'text' -%}
    {{- plain(content[0].text) -}}
  {%- else -%}
    {{- raise_exception('a system or user message must be one text') -}}
  {%- endif -%}
{%- endmacro -%}
{%- if not messages -%}{{- raise_exception('the conversation has no messages') -}}{%- endif -%}
{%- set state = namespace(system=none, turn=0, after_text=false) -%}
{{- BOS -}}
{%- for message in messages -%}
  {%- if loop.first and message.role == 'system' -%}
    {%- if loop.last -%}{{- raise_exception('a system message must be followed by a user message') -}}{%- endif -%}
    {%- set state.system = only_text(message.content) -%}
  {%- elif state.turn % 2 == 0 and message.role == 'user' -%}
    {{- USER_START -}}
    {%- if state.turn == 0 and state.system is not none -%}{{- state.system + '\\n\\n' -}}{%- endif -%}
    {{- only_text(message.content) -}}
    {{- USER_END -}}
    {%- set state.turn = state.turn + 1 -%}
  {%- elif state.turn % 2 == 1 and message.role == 'assistant' -%}
    {{- ASSISTANT_START -}}
    {%- if message.content is string -%}
      {{- plain(message.content) -}}
    {%- else -%}
      {%- set state.after_text = false -%}
      {%- for part in message.content -%}
        {%- if part.type == 'text' -%}
          {%- if state.after_text and part.text -%}
            {{- raise_exception('two text parts in a row: join them into one') -}}
          {%- endif -%}
          {{- plain(part.text) -}}
          {%- if part.text -%}{%- set state.after_text = true -%}{%- endif -%}
        {%- elif part.type == 'python' -%}
          {{- PYTHON_START -}}{{- plain(part.text) -}}{{- PYTHON_END -}}
          {%- set state.after_text = false -%}
        {%- elif part.type == 'python_output' -%}
          {{- OUTPUT_START -}}{{- plain(part.text) -}}{{- OUTPUT_END -}}
          {%- set state.after_text = false -%}
        {%- else -%}
          {{- raise_exception('unknown part type ' + part.type) -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
    {{- ASSISTANT_END -}}
    {%- set state.turn = state.turn + 1 -%}
  {%- else -%}
    {{- raise_exception('roles must alternate, user first, after at most one system message') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ASSISTANT_START -}}{%- endif -%}
"""

_NAMES = {
    "BOS": BOS, "USER_START": USER_START, "USER_END": USER_END, "ASSISTANT_START": ASSISTANT_START,
    "ASSISTANT_END": ASSISTANT_END, "PYTHON_START": PYTHON_START, "PYTHON_END": PYTHON_END,
    "OUTPUT_START": OUTPUT_START, "OUTPUT_END": OUTPUT_END,
}  # fmt: skip


def chat_template(special_tokens: list[str]) -> str:
    """The template's text for a tokenizer with these special tokens. Its output includes bos: add none."""
    text = _TEMPLATE.replace("SPECIAL_TOKENS", json.dumps(special_tokens))
    for name, token in _NAMES.items():
        text = text.replace("{{- " + name + " -}}", "{{- '" + token + "' -}}")
    return text
