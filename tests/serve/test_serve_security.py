"""Who may call the server, how much they may send, and bodies that make no sense."""

import contextlib
import copy
import json
import random
import socket

import pytest

from nanochat_jax.serve.main import ServeSettings
from nanochat_jax.serve.security import MAX_BODY, is_loopback
from tests.serve_fixtures import HI, serving, toy_engine

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def tiny():
    with serving(toy_engine()) as running:
        yield running


@pytest.fixture(scope="module")
def keyed():
    with serving(toy_engine(), key=KEY, origin="https://chat.example.org") as running:
        yield running


def raw(running, request: bytes) -> bytes:
    """Everything that comes back for these bytes until the server closes or waits for more."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                received += part
        return received


# --- hosts and origins ----------------------------------------------------------------------------


OWN = ["localhost", "127.0.0.1", "127.0.0.1:8000", "LOCALHOST:1", "[::1]:8000", "[::1]"]
FOREIGN = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "192.168.1.5", "[::2]", "", "["]


def test_only_names_of_this_machine_are_answered(tiny):
    for host in OWN:
        assert tiny.http.get("/health", headers={"Host": host}).status_code == 200
    for host in FOREIGN:  # rebound to this machine
        for method, path in (("GET", "/"), ("GET", "/v1/models"), ("POST", "/v1/completions")):
            answer = tiny.http.request(method, path, headers={"Host": host}, json={})
            assert answer.status_code in (400, 403) and "tiny" not in answer.text


def test_other_web_sites_are_refused(tiny):
    own = f"http://127.0.0.1:{tiny.port}"
    for origin, status in [
        (own, 200),
        ("null", 403),
        ("https://evil.example", 403),
        (own + "0", 403),
        (f"https://127.0.0.1:{tiny.port}", 403),
        (f"http://localhost:{tiny.port}", 403),
        ("http://127.0.0.1", 403),
    ]:
        answer = tiny.http.post("/v1/completions", headers={"Origin": origin}, json={"prompt": "a", "max_tokens": 1})
        assert answer.status_code == status, origin
        assert "access-control-allow-origin" not in answer.headers
    assert tiny.http.options("/v1/completions", headers={"Origin": "https://evil.example"}).status_code == 403


def test_one_web_site_may_be_let_in(keyed):
    origin = {"Origin": "https://chat.example.org"}
    preflight = keyed.http.options("/v1/completions", headers=origin)
    assert preflight.status_code == 204 and "authorization" in preflight.headers["access-control-allow-headers"]
    assert preflight.headers["access-control-allow-origin"] == origin["Origin"]
    assert "access-control-allow-credentials" not in preflight.headers
    assert keyed.http.get("/v1/models", headers=origin).status_code == 401
    answer = keyed.http.get("/v1/models", headers={**origin, "Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin["Origin"]
    assert keyed.http.options("/v1/models", headers={"Origin": "https://other.example"}).status_code == 403


# --- the key --------------------------------------------------------------------------------------


def test_the_key_guards_everything_but_the_page_and_health(keyed):
    paths = [("GET", p) for p in ("/v1/models", "/metrics", "/stats", "/openapi.json", "/nowhere")]
    paths += [("POST", p) for p in ("/v1/completions", "/v1/chat/completions")]
    for method, path in paths:
        for given in (None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer ä"):
            headers = {} if given is None else {"Authorization": given.encode()}
            answer = keyed.http.request(method, path, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health"):
        assert keyed.http.get(path).status_code == 200
    right = {"Authorization": f"bearer {KEY}", "Host": "any.name.example"}
    assert keyed.http.get("/v1/models", headers=right).status_code == 200


def test_which_addresses_need_a_key():
    assert all(is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LocalHost"))
    assert not any(is_loopback(h) for h in ("0.0.0.0", "::", "192.168.0.1", "example.org", "", "localhost.evil.org"))
    assert ServeSettings().host == "127.0.0.1"


# --- sizes ----------------------------------------------------------------------------------------


def test_a_long_body_is_not_read(tiny):
    for path in ("/v1/chat/completions", "/v1/completions"):
        answer = tiny.http.post(path, content=b"[" + b" " * MAX_BODY)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    claimed = raw(tiny, head + b"Content-Length: 99999999999999999999999\r\n\r\n")
    assert claimed.split()[1] in (b"400", b"413")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert raw(tiny, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 17).split()[1] == b"413"


def test_the_longest_texts_are_weighed_quickly(tiny):
    for character in " a1^\n\té🚀":
        size = MAX_BODY // (len(json.dumps(character, ensure_ascii=False).encode())) - 100
        text = json.dumps({"prompt": character * size}, ensure_ascii=False).encode()
        answer = tiny.http.post(
            "/v1/completions", content=text, headers={"Content-Type": "application/json"}, timeout=3
        )
        assert answer.status_code == 400, character


BODY = b'{"prompt": "a", "max_tokens": 1}'
ENCODED = [
    BODY,
    b"\xef\xbb\xbf" + BODY,
    BODY.decode().encode("utf-16"),
    BODY.decode().encode("utf-32-le"),
    b"\n " + BODY,
]


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=x",
        "application/vnd.api+json",
        "multipart/form-data",
        "nonsense",
        "APPLICATION/JSON",
    ],
)
def test_a_body_is_json_whatever_its_content_type_says(tiny, kind):
    for body in ENCODED[: 1 if kind else None]:
        headers = {} if kind is None else {"Content-Type": kind}
        answer = tiny.http.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == 200 and answer.json()["object"] == "text_completion", answer.text


# --- nonsense -------------------------------------------------------------------------------------

PATHS = ("/v1/chat/completions", "/v1/completions")
ODD = [
    None, True, False, 0, -1, 1, 1.5, 1e308, -1e308, 10**18, 10**400, float("nan"), float("inf"), "", "x", "\ud800",
    "\x00", "🚀" * 9, "a" * 3000, [], {}, [[]], [None], [1, "a"], {"a": {}}, [[[[[]]]]], {"type": "text"},
    [{"type": "text", "text": None}], [{"role": "user"}], [{"role": "user", "content": "\udc00"}], HI * 3,
    [-5, 2**40], [[1, 2], [3]], "<|assistant_start|>",
]  # fmt: skip


def nonsense(rng: random.Random) -> bytes:
    """A body: a right one, with some values or bytes exchanged mostly, or no JSON at all."""
    body: dict = {"messages": [dict(m) for m in HI], "max_tokens": 2, "temperature": 1, "stream": rng.random() < 0.3}
    if rng.random() < 0.3:
        body = {"prompt": "Hello", "max_tokens": 2, "n": 2, "stream": rng.random() < 0.3}
    names = [*body, *"stop seed top_p top_k n model tools stream_options logprobs echo zz".split()]
    for _ in range(rng.randint(0, 3)):
        inside = body.get("messages")
        if rng.random() < 0.3 and isinstance(inside, list) and inside and isinstance(inside[0], dict):
            inside[0][rng.choice(["role", "content", "name", "zz"])] = rng.choice(ODD)
        else:
            name = rng.choice(names)
            if name != "max_tokens" or rng.random() < 0.1:  # long answers are no nonsense
                body[name] = copy.deepcopy(rng.choice(ODD))
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.2:
        data = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind < 0.3:
        return text[: rng.randrange(len(text))]
    if kind < 0.35:
        depth = rng.choice([10, 1000, 100_000])
        return rng.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b"9" * depth])
    return rng.randbytes(rng.randint(0, 200)) if kind < 0.4 else text


LEAKS = (b"Traceback", b"nanochat_jax", b"site-packages", b'File "', b".py", b"Error(", b"pydantic", b"0x7f")


def attack(running, count: int, seed: int) -> dict[int, int]:
    rng, statuses = random.Random(seed), {}
    kinds = ["application/json"] * 8 + ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"]
    for _ in range(count):
        answer = running.http.post(
            rng.choice(PATHS), content=nonsense(rng), headers={"Content-Type": rng.choice(kinds)}, timeout=10
        )
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (answer.status_code, answer.text)
        if answer.status_code >= 400:
            assert "error" in answer.json() or "detail" in answer.json()
            assert not any(leak in answer.content for leak in LEAKS), answer.content
    running.idle()
    return statuses


def test_nonsense(tiny):
    statuses = attack(tiny, 200, 0)
    assert set(statuses) <= {200, 400, 404, 413, 422} and statuses[400] > 60 and statuses[200] > 5


@pytest.mark.slow
def test_thousands_of_bodies_of_nonsense(tiny):
    statuses = attack(tiny, 10_000, 1)
    assert set(statuses) <= {200, 400, 404, 413, 422}
    assert tiny.http.get("/health").json()["status"] == "ok" and tiny.worker.failure is None


def test_broken_http(tiny):
    for request in (
        b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 200_000 + b"\r\n\r\n",
    ):  # fmt: skip
        received = raw(tiny, request)
        assert not received or received.split()[1] in (b"400", b"403", b"431"), received[:200]
    assert tiny.http.get("/health").status_code == 200
