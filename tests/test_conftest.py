"""The guards of conftest.py themselves."""

import socket

import jax
import jax.numpy as jnp
import pytest


def test_eight_devices_and_strict_ranks():
    assert jax.device_count() == 8 and jax.default_backend() == "cpu"
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))


def test_the_network_is_closed():
    with pytest.raises(OSError, match="may not use the network"):
        socket.create_connection(("example.com", 80), timeout=1)
    for address in (("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0)):
        family = socket.AF_INET if len(address) == 2 else socket.AF_INET6
        with socket.socket(family) as s, pytest.raises(OSError, match="may not use the network"):
            s.connect(address)
        with socket.socket(family) as s, pytest.raises(OSError, match="may not use the network"):
            s.connect_ex(address)


def test_loopback_is_open():
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(("localhost", server.getsockname()[1]))
