"""CustomJSON: conversations of the user's own, one JSON list of messages a line, in the order of the file."""

import json
import logging
from pathlib import Path
from typing import Any

from nanochat_jax.data.readers import DataError
from nanochat_jax.utils.paths import sha256_hex
from tasks.task import Conversation, Task, TaskError, check_alternation

logger = logging.getLogger(__name__)

KEPT_MESSAGES = 20


class CustomJSON(Task):
    """Conversations of a file whose lines are ``[{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]``.

    Blank lines are skipped. A bad line raises TaskError, or json.JSONDecodeError where it is no JSON (both are
    ValueErrors), naming file, line and reason; with ``strict=False`` it is left out, counted in ``bad_lines`` and
    reported (``messages`` has the first twenty). Raises FileNotFoundError for a missing file, which the reference takes
    for an empty one, and DataError for a file without any conversation.
    """

    name = "CustomJSON"

    def __init__(self, path: str | Path, strict: bool = True, **slicing):
        super().__init__(**slicing)
        self.path = Path(path)
        self.bad_lines = 0
        self.messages: list[str] = []
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}; give one with a JSON list of messages on each line")
        content = self.path.read_bytes()
        self._sha256 = sha256_hex(content)
        self._conversations: list[list[dict[str, Any]]] = []
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                self._conversations.append(_messages(line, f"{self.path}:{number}"))
            except ValueError as error:
                if strict:
                    raise
                self._report(str(error))
        if not self._conversations:
            bad = f"all {self.bad_lines} lines are bad, first {self.messages[0]}" if self.bad_lines else "it is blank"
            raise DataError(f"{self.path} has no conversation ({bad}); each line must be a JSON list of messages")

    def _report(self, message: str) -> None:
        self.bad_lines += 1
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(message)
            logger.warning("left out a bad line: %s", message)

    def num_examples(self) -> int:
        return len(self._conversations)

    def get_example(self, index: int) -> Conversation:
        return {"messages": self._conversations[index]}

    def identity(self) -> dict[str, Any]:
        return {"file": self._sha256}


def _messages(line: bytes, where: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"{where}: no JSON: {error.msg}", error.doc, error.pos) from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{where}: no UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise TaskError(f"{where}: nested too deeply") from None
    reason = check_alternation(messages)
    if reason is not None:
        raise TaskError(f"{where}: {reason}")
    return messages
