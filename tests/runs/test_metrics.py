"""The metrics file and its sinks: nothing that a sink does may reach the run."""

import errno
import io
import os
import re
import sys
import time
from types import SimpleNamespace

import pytest

from nanochat_jax.runs import metrics
from nanochat_jax.utils import paths
from nanochat_jax.utils.errors import exit_status


def written(folder, *records):
    """A metrics file with these records."""
    log = metrics.MetricsLog(path := folder / "metrics.jsonl")
    for record in records:
        log.write(record)
    log.close()
    return path


def test_lines_are_read_back_and_a_torn_line_is_left_out(tmp_path):
    path = written(tmp_path, {"kind": "train", "step": 0, "loss": 1.5})
    with open(path, "a") as f:
        f.write('{"kind": "train", "st')
    assert metrics.read(path) == [{"kind": "train", "step": 0, "loss": 1.5}]
    assert metrics.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("keep_eval", [True, False])
def test_rewind_drops_exactly_what_will_be_written_again(tmp_path, keep_eval):
    path = written(tmp_path, *({"kind": kind, "step": step} for step in range(4) for kind in ("eval", "train")))
    metrics.rewind(path, 2, keep_eval)
    kept = [(r["kind"], r["step"]) for r in metrics.read(path)]
    expected = [("eval", 0), ("train", 0), ("eval", 1), ("train", 1)]
    assert kept == expected + ([("eval", 2)] if keep_eval else [])


def test_a_sink_that_raises_or_hangs_does_not_stop_the_run(tmp_path):
    seen = []

    def hangs(record):
        time.sleep(60)

    def raises(record):
        raise ConnectionError("no route")

    log = metrics.MetricsLog(tmp_path / "m.jsonl", {"hangs": hangs, "raises": raises, "works": seen.append})
    began = time.monotonic()
    for step in range(2000):
        log.write({"kind": "train", "step": step})
    assert time.monotonic() - began < 10
    deadline = time.monotonic() + 20
    while len(seen) < 2000 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(metrics.read(tmp_path / "m.jsonl")) == 2000
    assert [r["step"] for r in seen[:10]] == list(range(10))
    log._sinks[0]._failed = True  # do not wait for the sleeper
    log._sinks = [s for s in log._sinks if s._name != "hangs"]
    log.close()


def test_unknown_sink_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="wandb, tensorboard"):
        metrics.open_sinks("wandbb", "run", tmp_path, {})


def test_a_missing_sink_package_is_reported_and_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert metrics.open_sinks("wandb", "run", tmp_path, {}) == {}
    assert "pip install '.[wandb]'" in caplog.text


@pytest.mark.parametrize("offline, mode", [("1", "offline"), ("", None)])
def test_wandb_gets_every_number_and_cannot_wait_for_an_answer(tmp_path, monkeypatch, offline, mode):
    begun, logged = {}, []
    fake = SimpleNamespace(
        init=lambda **options: begun.update(options),
        log=lambda numbers, step: logged.append((step, numbers)),
        Settings=lambda **options: options,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("NANOCHAT_OFFLINE", offline)
    sinks = metrics.open_sinks("wandb", "toy", tmp_path, {"depth": 4})
    sinks["wandb"]({"kind": "train", "step": 3, "loss": 1.5})
    assert logged == [(3, {"train/loss": 1.5})]
    assert (begun["id"], begun["config"], begun["mode"]) == ("toy", {"depth": 4}, mode)
    assert begun["settings"] == {"login_timeout": 30, "init_timeout": 60}


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    logged = []
    writer = SimpleNamespace(add_scalar=lambda *what: logged.append(what))
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=lambda folder: writer))
    sinks = metrics.open_sinks("tensorboard", "toy", tmp_path, {})
    sinks["tensorboard"]({"kind": "eval", "step": 3, "val_bpb": 1.5, "note": "text"})
    assert logged == [("eval/val_bpb", 1.5, 3)]


FULL = r"no space for \S+metrics\.jsonl \(%s needed, [0-9,.]+ (bytes|MB|GB) free; No space left.*\): free some space"


def test_a_full_disk_is_named_with_its_remedy(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log = metrics.MetricsLog(path)
    with pytest.raises(OSError, match=FULL % "29 bytes") as caught:
        log.write({"kind": "train", "step": 0})
    assert caught.value.errno == errno.ENOSPC
    log.close()


class Broken:
    """A file that the disk takes nothing of."""

    def __init__(self, error: OSError):
        self.error = error

    def write(self, line=""):
        raise self.error

    close = flush = write


def test_another_trouble_with_the_disk_is_named_too(tmp_path):
    log = metrics.MetricsLog(tmp_path / "metrics.jsonl")
    log._file.close()
    log._file = Broken(OSError(errno.EIO, "Input/output error"))  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written \(Input/output error\)") as caught:
        log.write({"kind": "train", "step": 0})
    assert "free some space" not in str(caught.value), "that would not help"


@pytest.mark.parametrize("room", [0, 100])
def test_going_on_with_a_full_disk_says_so_and_spoils_nothing(room, tmp_path, monkeypatch, capsys):
    path = written(tmp_path, *({"kind": "train", "step": step} for step in range(9)))
    before, kept = path.read_bytes(), 5 * len(b'{"kind": "train", "step": 0}\n')
    with monkeypatch.context() as patch:
        patch.setattr(paths, "open", lambda path, mode: io.BufferedWriter(Filling(path, mode, room)), raising=False)
        assert exit_status(lambda: metrics.rewind(path, 5, keep_eval=False)) == 1
        line = capsys.readouterr().err
        assert re.match("error: " + FULL % f"{kept} bytes", line) and line.count("\n") == 1
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["metrics.jsonl"]
        with pytest.raises(OSError, match=r"no space for \S+x \([0-9,.]+ (bytes|MB|GB) free; No space left") as caught:
            with paths.atomic_writer(tmp_path / "x") as file:  # which does not know how much it will be
                file.write(bytes(1000))
        assert caught.value.errno == errno.ENOSPC, "callers that know more ask for it"
        with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '/elsewhere'$"):
            with paths.atomic_writer(tmp_path / "x"):
                raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere")
    metrics.rewind(path, 5, keep_eval=False)
    assert len(path.read_bytes()) == kept


class Filling(io.FileIO):
    """A file on a disk with room for so many bytes."""

    def __init__(self, path, mode, room: int):
        super().__init__(path, mode)
        self._room = room

    def write(self, data, /):
        room = self._room - os.fstat(self.fileno()).st_size
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(bytes(data[:room]))
