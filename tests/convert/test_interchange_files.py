"""Files from strangers: what may be read is read exactly, everything else is refused by name and nothing is run."""

import io
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from nanochat_jax.convert import InterchangeError, pt_files
from nanochat_jax.text.tokenizer import Tokenizer
from tests.golden_models import golden_arrays

NAMES = {"collections.OrderedDict": lambda *items: dict(*items)}


class Calls:
    """Pickles to a call, as an attacker writes it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def read(data: bytes):
    return pt_files.unpickle(data, NAMES, "the file")


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back(protocol):
    shared = ["the same object twice"]
    value = {"a": [1, 2**70, 1.5, None, True, "é", ("x",), ()], "d": OrderedDict(k=1), "twice": [shared, shared]}
    got = read(pickle.dumps(value, protocol))
    assert got == value and got["twice"][0] is got["twice"][1]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "eval"), (exec, "exec"), (getattr, "getattr"), (__import__, "__import__")],
)
def test_calls_are_refused_by_name_and_not_made(protocol, function, name, tmp_path):
    witness = tmp_path / "was_here"
    argument = f"touch {witness}" if function is os.system else f"open({str(witness)!r}, 'w')"
    for hostile in (Calls(function, argument), {"weights": [Calls(function, argument)]}):
        with pytest.raises(InterchangeError, match=name):
            read(pickle.dumps(hostile, protocol))
    assert not witness.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"ios\nsystem\n(S'echo'\ntR.",  # INST
        b"(ios\nsystem\n.",
        b"cos\nsystem\n.",
        b"c__builtin__\neval\n.",
        b"(S'echo hi'\nios\nsystem\n.",
        b"\x80\x02]\x82\x01.",  # an extension code
        b"Pid\n.",  # a persistent id where none is expected
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02]}(X\x01\x00\x00\x00aK\x01ub.",  # a state for a list
        b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R\x92.",  # NEWOBJ_EX
    ],
)
def test_other_instructions_are_refused(data):
    with pytest.raises(InterchangeError, match="the file"):
        pt_files.unpickle(data, {}, "the file")


@pytest.mark.parametrize(
    "data",
    [
        b"", b".", b"\x80", b"\x80\x04", b"]", b"(((", b"0.", b"a.", b"K\x01K\x02.", b"t.", b"(K\x01d.", b"h\x05.",
        b"]]K\x01s.", b"}]K\x01s.", b"\x80\x04\x8c\xffa.", b"X\xff\xff\xff\x7fab.", b"L" + b"9" * 5000 + b"L\n.",
        b"\x8e" + struct.pack("<Q", 10 << 30) + b"short.",  # ten gigabytes are claimed
        b"\x96" + struct.pack("<Q", 10 << 30) + b"short.", b"Nr\xff\xff\xff\x7f1.",
        b"\x8d" + struct.pack("<Q", 1 << 62) + b"x.", b"r\xff\xff\xff\x7f.", b"S'\\x'\n.", b"K\x01R.", b"K\x01)R.",
    ],
)  # fmt: skip
def test_damaged_streams_are_refused(data):
    with pytest.raises(InterchangeError, match="the file"):
        read(data)


def test_no_cut_or_flipped_byte_gets_through_as_another_error():
    good = pickle.dumps({"a": [1, 2.5, b"xyz", ("t", None)], "b": OrderedDict(k="v")}, 4)
    rng = np.random.default_rng(0)
    for i in range(len(good)):
        for data in (good[:i], good[:i] + bytes(rng.integers(0, 256, 1, np.uint8)) + good[i + 1 :]):
            try:
                read(data)
            except InterchangeError:
                pass


def test_little_memory_is_taken_for_what_is_only_claimed():
    """A billion places of a memo, ten gigabytes of bytes: nothing of it is there."""
    claims = [b"Nr\xff\xff\xff\x7f0" * 2, b"\x96" + struct.pack("<Q", 10 << 30), b"\x8e" + struct.pack("<Q", 10 << 30)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for claim in claims:
        with pytest.raises(InterchangeError):
            read(b"\x80\x05" + claim)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (256 << 10)  # in KiB
    with pytest.raises(InterchangeError, match="at most"):
        read(bytes(pt_files.MAX_PICKLE_BYTES + 1))


def test_a_pickle_cannot_change_what_stands_for_its_names(tmp_path):
    """BUILD sets attributes: of a tensor, of the functions that make them, of a dict that hides its methods."""
    path, before = write(tmp_path / "x.pt", ARRAYS), dict(vars(pt_files))
    order = b"ccollections\nOrderedDict\n"
    state = b"}(X\x05\0\0\0itemsK\x01X\x08\0\0\0__code__K\x01u"
    for made in (order + b")R" + state + b"b.", order + state + b"b.", order + b"N" + state + b"\x86b."):
        bad = rewritten(path, tmp_path / "bad.pt", lambda n, d, made=made: made if n.endswith("data.pkl") else d)
        try:
            got = pt_files.read(bad)
        except InterchangeError:
            continue
        assert not isinstance(got, dict) or got.items() == {}.items()
    assert vars(pt_files) == before
    assert list(pt_files.read(path)) == list(ARRAYS)


# --- torch files -----------------------------------------------------------------------------------------------------


def write(path: Path, tensors) -> Path:
    with open(path, "wb") as file:
        pt_files.write(file, tensors)
    return path


ARRAYS = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5, dtype=np.int32), "c.d": np.float32([])}


def rewritten(source: Path, target: Path, change) -> Path:
    """The zip file with each entry's content passed through change(name, bytes); None leaves it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if (data := change(name, old.read(name))) is not None:
                new.writestr(name, data)
    return target


def test_a_file_written_by_torch_is_read_exactly(golden):
    got = pt_files.read(golden / "interchange" / "model_000007.pt")
    expected = golden_arrays("interchange/model_000007")
    assert {name.removeprefix("_orig_mod.") for name in got} == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[f"_orig_mod.{name}"].astype(np.float32), array)
    assert got["_orig_mod.transformer.wte.weight"].dtype == ml_dtypes.bfloat16


def test_own_files_round_trip_and_are_what_torch_describes(tmp_path):
    path = write(tmp_path / "x.pt", ARRAYS)
    got = pt_files.read(path)
    assert list(got) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype and not got[name].flags.writeable
    np.testing.assert_array_equal(pt_files.read(write(tmp_path / "one.pt", ARRAYS["b"])), ARRAYS["b"])

    # the standard library's unpickler, with a recorder in torch's place, sees the calls that torch.save writes
    class Recorder(pickle.Unpickler):
        def find_class(self, module, name):
            return OrderedDict if name == "OrderedDict" else lambda *arguments: (module, name, arguments)

        def persistent_load(self, pid):
            return pid[0], pid[2:]

    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/byteorder") == b"little" and archive.read("archive/version") == b"3\n"
        seen = Recorder(io.BytesIO(archive.read("archive/data.pkl"))).load()
    module, name, (storage, offset, shape, strides, grad, hooks) = seen["a"]
    assert (module, name, storage, offset) == ("torch._utils", "_rebuild_tensor_v2", ("storage", ("0", "cpu", 12)), 0)
    assert (shape, strides, grad, hooks) == ((3, 4), (4, 1), False, OrderedDict())


def test_torch_reads_own_files_and_we_read_views(tmp_path):
    torch = pytest.importorskip("torch")
    path = write(tmp_path / "x.pt", ARRAYS)
    got = torch.load(path, weights_only=True)
    assert all(np.array_equal(got[name].numpy(), array) for name, array in ARRAYS.items())
    base = torch.arange(24.0).reshape(4, 6)
    saved = {"t": base.T, "part": base[1:3, ::2], "half": base.half(), "scalar": torch.tensor(3)}
    saved["none"] = torch.ones(0, 2)
    torch.save(saved | {"parameter": torch.nn.Parameter(base)}, tmp_path / "y.pt")
    back = pt_files.read(tmp_path / "y.pt")
    for name, tensor in saved.items():
        np.testing.assert_array_equal(back[name], tensor.numpy())
    torch.save(saved, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InterchangeError, match=r"old\.pt"):
        pt_files.read(tmp_path / "old.pt")


def test_damage_and_lies_are_refused(tmp_path):
    path = write(tmp_path / "x.pt", ARRAYS)
    data = path.read_bytes()
    bad = tmp_path / "bad.pt"
    for cut in (0, 1, 100, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:cut])
        with pytest.raises(InterchangeError, match=r"bad\.pt"):
            pt_files.read(bad)
    at = data.index(ARRAYS["a"].tobytes())
    bad.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(InterchangeError, match="CRC-32"):
        pt_files.read(bad)
    for entry, change, named in (("data/0", None, "data/0"), ("data/0", data[at : at + 44], "data/0 holds 11"),
                                 ("byteorder", b"big", "big-endian"), ("data.pkl", None, "data.pkl")):  # fmt: skip
        with pytest.raises(InterchangeError, match=named):
            pt_files.read(rewritten(path, bad, lambda n, d, e=entry, c=change: c if n.endswith(e) else d))


@pytest.mark.parametrize(
    "shape, strides, offset",
    [
        ((10 << 28,), (1,), 0),
        ((1 << 20, 1 << 20), (0, 0), 0),
        ((3, 4), (4, 2), 0),
        ((3, 4), (4, 1), 1),
        ((2,), (-1,), 1),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, shape, strides, offset):
    def lie(name, data):
        if not name.endswith("data.pkl"):
            return data
        out = io.BytesIO()
        rebuild = pt_files._Global("torch._utils", "_rebuild_tensor_v2")
        arguments = pt_files._Storage("0", "FloatStorage", 12), offset, shape, strides, False, OrderedDict()
        pickler = pt_files._Pickler(out, 2)
        pickler.dump(Calls(rebuild, *arguments))
        return out.getvalue()

    with pytest.raises(InterchangeError, match="refused"):
        pt_files.read(rewritten(write(tmp_path / "x.pt", ARRAYS), tmp_path / "bad.pt", lie))


def test_a_zip_bomb_is_refused_before_it_is_opened(tmp_path):
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(50_000_000))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(InterchangeError, match=r"compressed.*never compresses"):
        pt_files.read(bomb)
    stored = write(tmp_path / "x.pt", ARRAYS).read_bytes()
    central = stored.index(b"PK\x01\x02", stored.rindex(b"PK\x03\x04"))
    sizes = struct.pack("<II", 1 << 30, 1 << 30)  # an entry that overlaps all others and claims more than the file
    bomb.write_bytes(stored[: central + 20] + sizes + stored[central + 28 :])
    with pytest.raises(InterchangeError, match="claim"):
        pt_files.read(bomb)


def test_a_hostile_torch_file_is_refused_without_running_it(tmp_path):
    witness = tmp_path / "was_here"
    hostile = pickle.dumps({"model": Calls(os.system, f"touch {witness}")}, 2)
    path = write(tmp_path / "x.pt", ARRAYS)
    with pytest.raises(InterchangeError, match="posix.system"):
        pt_files.read(rewritten(path, tmp_path / "bad.pt", lambda n, d: hostile if n.endswith("data.pkl") else d))
    assert not witness.exists()


# --- tokenizer.pkl ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat, 1234 times; it's héllo"] * 4, 300)


def test_the_reference_and_we_read_each_others_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.pkl"
    for protocol in (3, 4, 5):  # what tiktoken itself pickles to
        path.write_bytes(pickle.dumps(tokenizer._encoding, protocol))
        assert pt_files.read_tokenizer(path).hash == tokenizer.hash
    path.write_bytes(pt_files.tokenizer_bytes(tokenizer))
    theirs = pickle.loads(path.read_bytes())
    assert theirs.name == "rustbpe" and theirs.n_vocab == tokenizer.vocab_size
    for text in ("the mat 1234 it's", "héllo <|bos|> 你好"):
        assert theirs.encode_ordinary(text) == tokenizer.encode(text)
    assert pt_files.read_tokenizer(path).hash == tokenizer.hash


def test_other_contents_of_a_tokenizer_file_are_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.pkl"
    state = tokenizer._encoding.__getstate__()
    changes = {
        "gaps": {"mergeable_ranks": {b"a": 0, b"b": 2}},
        "types": {"pat_str": 3},
        "special": {"special_tokens": {}},
    }
    bad = {
        "posix.system": pickle.dumps(Calls(os.system, f"touch {tmp_path / 'was_here'}")),
        "tokenizer.pkl": pickle.dumps({"mergeable_ranks": {}}),
    }
    for message, change in changes.items():
        body = pickle.dumps({**state, **change}, 3)[2:-1]
        bad[message] = b"\x80\x03ctiktoken.core\nEncoding\n)\x81" + body + b"b."
    for message, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(InterchangeError, match=message):
            pt_files.read_tokenizer(path)
    assert not (tmp_path / "was_here").exists()
