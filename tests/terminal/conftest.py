"""An empty base directory and an engine of one slot for every test of the terminal chat."""

import pytest

from tests.serve_fixtures import toy_engine


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def engine():
    return toy_engine(slots=1)
