"""Fields of requests that this server does not know. Clients send many that are other servers' or newer than this one:
they are ignored, and named in a header of the response and once in the log. A strict server refuses them."""

import logging
import re
from collections.abc import Iterator

from nanochat_jax.serve import schemas
from nanochat_jax.serve.api_errors import ApiError

logger = logging.getLogger(__name__)

HEADER = "X-Ignored-Fields"
# Options of OpenAI's that no completion here depends on: the values (beside null) that are no wish, and are not named.
_NO_WISH = {
    "functions": [[]],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "service_tier": ["auto", "default"],
    "store": [False],
    **dict.fromkeys("audio prediction reasoning_effort verbosity web_search_options moderation".split(), []),
    **dict.fromkeys("prompt_cache_retention prompt_cache_options".split(), []),
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # what may stand in a header; anything else is shown as "?"
_SHOWN = 20  # names in a header
_LOGGED = 200  # names that the log tells of


class IgnoredFields:
    """What is done about them. strict: they are refused, also those inside messages, of which else nothing is said."""

    def __init__(self, strict: bool):
        self._strict = strict
        self._told: set[str] = set()

    def headers(self, body: schemas.Body) -> dict[str, str]:
        """The header that names them, if there are any. Raises ApiError where the server is strict."""
        found = [name for name in unknown(body) if self._strict or not name.startswith("messages.")]
        if found and self._strict:
            raise ApiError(
                400, f"unknown field {found[0]!r}", param=found[0].partition(".")[0], code="unknown_parameter"
            )
        names = list(dict.fromkeys(name if _NAME.fullmatch(name) else "?" for name in found))[:_SHOWN]
        new = [name for name in names if name not in self._told]
        if new and len(self._told) < _LOGGED:
            self._told.update(new)
            logger.info("requests have fields that are ignored: %s (--strict refuses them)", ", ".join(new))
        return {HEADER: ", ".join(names)} if names else {}


def unknown(body: schemas.Body, path: str = "") -> Iterator[str]:
    """Where a body has fields that its schema does not know: "min_p", "messages.0.id"."""
    for name, value in (body.model_extra or {}).items():
        if path or name not in _NO_WISH or not (value is None or value in _NO_WISH[name]):
            yield path + name
    for name in type(body).model_fields:
        value = getattr(body, name)
        for index, inside in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(inside, schemas.Body):
                yield from unknown(inside, f"{path}{name}." if index is None else f"{path}{name}.{index}.")
