"""What the server counts, in Prometheus' text format. Nothing here holds a word of anyone's text."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """One server's numbers, in a registry of its own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "nanochat_requests", "HTTP requests answered, by path and status", ["path", "code"], registry=registry
        )
        self._refused = Counter("nanochat_queue_full", "requests refused because the queue was full", registry=registry)
        self._tokens = Counter("nanochat_generated_tokens", "tokens generated", registry=registry)
        self._prompt_tokens = Counter("nanochat_prompt_tokens", "tokens of prompts", registry=registry)
        self._cached_tokens = Counter(
            "nanochat_cached_prompt_tokens", "prompt tokens found in the cache", registry=registry
        )
        self._first = Histogram(
            "nanochat_time_to_first_token_seconds",
            "from a request's arrival to its first token, waiting included",
            buckets=_FIRST,
            registry=registry,
        )
        self._between = Histogram(
            "nanochat_time_per_token_seconds",
            "between the tokens of one answer (those of one decode call share its time)",
            buckets=_BETWEEN,
            registry=registry,
        )

    def watch(self, worker: Any) -> None:
        """Shows a worker's queue, slots and step, read whenever somebody asks."""
        for name, help, value in [
            ("nanochat_queue_length", "requests waiting for a slot", lambda: worker.waiting),
            ("nanochat_slots_busy", "requests running", lambda: worker.running),
            ("nanochat_slots", "requests that can run at once", lambda: worker.engine.slots),
            ("nanochat_model_step", "training step of the checkpoint in use", lambda: worker.model.step),
            ("nanochat_healthy", "1 while the decode thread works", lambda: float(worker.healthy)),
        ]:
            Gauge(name, help, registry=self.registry).set_function(value)

    def request(self, path: str, code: int) -> None:
        self._requests.labels(path, str(code)).inc()

    def refused(self) -> None:
        self._refused.inc()

    def prompt(self, tokens: int, cached: int) -> None:
        self._prompt_tokens.inc(tokens)
        self._cached_tokens.inc(cached)

    def tokens(self, count: int, seconds: float, first: bool) -> None:
        """`count` new tokens of one answer, `seconds` after its last ones (first: after it was asked for)."""
        self._tokens.inc(count)
        if first:
            self._first.observe(seconds)
            return
        for _ in range(count):
            self._between.observe(seconds / count)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
