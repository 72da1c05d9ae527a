"""Asking a web server: which errors are worth another attempt, how long to wait, what to send along.

Proxies come from the usual environment variables (``https_proxy``, ``no_proxy`` ...), as urllib does it. No socket is
opened when ``NANOCHAT_OFFLINE`` is set.
"""

import contextlib
import email.utils
import errno
import http.client
import json
import logging
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from nanochat_jax.utils.errors import DISK_FULL, UserError
from nanochat_jax.utils.paths import OFFLINE_VARIABLE, offline

logger = logging.getLogger(__name__)

ATTEMPTS = 5  # in a row without getting anywhere
TIMEOUT_S = 30.0
# An attempt that got so many bytes was a success, even if it broke off: the patience starts anew.
_GETTING_ON_BYTES = 256 * 1024
# How long a server may ask us to wait. The hub's windows are five minutes.
MAX_PAUSE_S = 330.0
# Answers that may be different in a moment; any other error status is final.
_PASSING = (408, 425, 429, 500, 502, 503, 504)
# Trying again will not help against these.
_DISK_ERRORS = {*DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENOTDIR}

Answer = TypeVar("Answer")


class FetchError(UserError, ConnectionError):
    """A file that could not be fetched; the message names the address and the remedy."""


class FinalError(FetchError):
    """One that the same request will meet again."""


class OfflineError(FinalError):
    """Refused before any socket was opened, because ``NANOCHAT_OFFLINE`` is set."""


class Stopped(FinalError):
    """Given up because the caller asked for it; what has arrived is kept."""


def refuse_offline(what: str) -> None:
    """Raises OfflineError if ``NANOCHAT_OFFLINE`` is set."""
    if offline():
        raise OfflineError(f"{OFFLINE_VARIABLE} is set, so {what} is not fetched; unset it, or put the file in place")


def fetch_bytes(url: str, timeout: float | None = None) -> bytes:
    """Contents of a small file, one attempt. Raises OfflineError or OSError."""
    refuse_offline(url)
    with open_answer(request_for(url, None), timeout or TIMEOUT_S) as answer:
        return answer.read()


def fetch_json(
    url: str, token: str | None = None, wait: float = 1.0, stop: threading.Event | None = None
) -> tuple[Any, str | None]:
    """A JSON answer and the address of its next page (``Link: <...>; rel="next"``) or None; persistent as fetch_file.

    Raises FetchError, also for an answer that is no JSON.
    """
    refuse_offline(url)

    def attempt() -> tuple[Any, str | None]:
        with open_answer(request_for(url, token), TIMEOUT_S) as answer:
            body, link = answer.read(), answer.headers.get("Link")
        try:
            return json.loads(body), _next_page(link)
        except ValueError as error:
            raise FinalError(f"{url} sent no JSON ({_look(body)}); check HF_ENDPOINT and your proxy") from error

    return persist(url, attempt, wait, stop)


# --- persistence ------------------------------------------------------------------------------------------------------


def persist(
    url: str,
    attempt: Callable[[], Answer],
    wait: float,
    stop: threading.Event | None,
    gained: Callable[[], int] = lambda: 0,
) -> Answer:
    """The first answer of ``attempt`` that is one; ``gained`` tells how many bytes the latest attempt brought.

    Gives up after five attempts in a row that got nowhere. Raises FetchError (Stopped when ``stop`` is set); errors of
    the disk pass through.
    """
    failures = 0
    while True:
        asked: float | None = None
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            with error:
                problem: Exception = _passing(url, error)
                asked = _retry_after(error)
        except FinalError:
            raise
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts, resets, answers cut short
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise
            problem = error
        failures = 1 if gained() >= _GETTING_ON_BYTES else failures + 1
        if failures >= ATTEMPTS:
            raise FetchError(
                f"{url}: {ATTEMPTS} attempts failed, the last with: {_words(problem)}; run again to go on from here"
            )
        pause = wait * 2 ** (failures - 1)
        if asked is not None and asked > pause:
            if asked > MAX_PAUSE_S:
                raise FinalError(f"{url}: {_words(problem)}: the server asks to wait {asked:.0f} s; run again then")
            pause = asked * random.uniform(1, 1.25)  # never earlier than asked, and not all at once
        else:
            pause *= random.uniform(0.75, 1.25)
        logger.info("%s: %s; next attempt in %.1f s", url, _words(problem), pause)
        _sleep(pause, stop)


def _passing(url: str, error: urllib.error.HTTPError) -> Exception:
    """The error of an answer worth another attempt; raises FinalError for any other."""
    said = error.headers.get("X-Error-Message") if error.headers else None
    said = f" ({said})" if said else ""
    if error.code in (401, 403):
        raise FinalError(
            f"{url}: access denied (HTTP {error.code}){said}; set HF_TOKEN to a token that may read it"
        ) from error
    if error.code not in _PASSING:
        raise FinalError(f"{url}: HTTP {error.code} {error.reason}{said}") from error
    return error


def _words(problem: Exception) -> str:
    return str(problem) or type(problem).__name__


def _sleep(seconds: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped("stopped")


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    value = (error.headers.get("Retry-After") or "").strip() if error.headers else ""
    if value.isdigit():
        return float(value)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def request_for(url: str, token: str | None) -> urllib.request.Request:
    """A request with this project's headers; the token is not sent on to where the server redirects."""
    request = urllib.request.Request(url, headers={"User-Agent": "nanochat_jax", "Accept-Encoding": "identity"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def open_answer(request: urllib.request.Request, timeout: float) -> Any:
    """The answer to a request. Raises OSError (HTTPError for a status that is an error)."""
    # urllib keeps the proxies of its first call for ever unless an opener is made anew.
    return urllib.request.build_opener().open(request, timeout=timeout)


def _next_page(link: str | None) -> str | None:
    for item in (link or "").split(","):
        address, _, relation = item.partition(";")
        if 'rel="next"' in relation:
            return address.strip().removeprefix("<").removesuffix(">")
    return None


def _look(body: bytes) -> str:
    return "a web page" if body.lstrip()[:1] == b"<" else repr(body[:40])
