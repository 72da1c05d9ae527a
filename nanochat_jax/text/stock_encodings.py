"""tiktoken's stock encodings, fetched with this project's manners: a time limit, proxies, offline mode."""

import threading
from typing import Any

import tiktoken
import tiktoken.load

from nanochat_jax.data.web import FetchError, fetch_bytes

_lock = threading.Lock()


def stock_encoding(name: str) -> Any:
    """The `tiktoken.Encoding` of that name, from tiktoken's cache or fetched.

    Raises ValueError for an unknown name, FetchError when it is not cached and cannot be fetched.
    """
    with _lock:
        original = tiktoken.load.read_file
        # Its own reader has no time limit and knows nothing of offline mode.
        tiktoken.load.read_file = lambda path: fetch_bytes(path) if "://" in path else original(path)
        try:
            return tiktoken.get_encoding(name)
        except OSError as error:
            raise FetchError(
                f"the encoding {name} is not in tiktoken's cache and cannot be fetched ({error}); load it once with a "
                "network, or point TIKTOKEN_CACHE_DIR to a copy of the cache"
            ) from error
        finally:
            tiktoken.load.read_file = original
