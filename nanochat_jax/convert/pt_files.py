"""The reference's files that hold pickles, read without ever building anything but numbers, text and plain containers:
PyTorch's `.pt` files (zip form, PyTorch itself is not needed) and `tokenizer.pkl`.

    <name>/data.pkl        the tree: containers, and for each tensor its storage, offset, shape and strides
    <name>/data/<key>      the bytes of one storage
    <name>/byteorder, <name>/version

A pickle is a program that may call anything importable, so `find_class` hands out nothing but the few constructors of
this file. Everything a file claims is held against its real size before anything is allocated.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import tiktoken

from nanochat_jax.convert import InterchangeError
from nanochat_jax.text.chat_format import BOS
from nanochat_jax.text.tokenizer import Tokenizer, TokenizerError

# A pickle of one-byte instructions grows two hundred times in memory. A tokenizer of 200,000 tokens takes 4 MB.
MAX_PICKLE_BYTES = 16 << 20
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number as a pickle: files before torch 1.6
_STORAGES = {
    "torch.FloatStorage": np.dtype("<f4"), "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.HalfStorage": np.dtype("<f2"), "torch.DoubleStorage": np.dtype("<f8"), "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"), "torch.ShortStorage": np.dtype("<i2"), "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"), "torch.BoolStorage": np.dtype("?"),
}  # fmt: skip
_DAMAGES = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError,
    ValueError, pickle.UnpicklingError, struct.error,
)  # fmt: skip


# --- pickles ---------------------------------------------------------------------------------------------------------


class _Unpickler(pickle._Unpickler):
    """The standard library's own in Python: the one in C allocates what a memo index or a length claims. What it is
    given in `names` must be made for each file, since a pickle may set attributes of it."""

    stack: list[Any]
    metastack: list[Any]
    persistent_load: Any
    # of an instruction that is missing here (memory for bytes is taken before they are read, buffers beside the pickle)
    # the standard library says KeyError
    dispatch: Any = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in (pickle.BYTEARRAY8[0], pickle.NEXT_BUFFER[0], pickle.READONLY_BUFFER[0])
    }

    def __init__(self, data: bytes, names: Mapping[str, Any], what: str, persistent: Callable[[Any], Any]):
        super().__init__(io.BytesIO(data))
        self.names, self.what, self.persistent_load = names, what, persistent

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}.{name}"
        if known not in self.names:
            raise InterchangeError(
                f"{self.what} asks for {known!r}, which is no tensor or plain container: refused, nothing was run. If "
                "you trust the file, save only its tensors again where it was made"
            )
        return self.names[known]

    def load(self) -> Any:
        value = super().load()
        if self.stack or self.metastack:
            raise pickle.UnpicklingError("more than one value at the end")
        return value


def unpickle(data: bytes, names: Mapping[str, Any], what: str, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value that a pickle describes.

    names: "module.name" -> what stands for it, made for this call. persistent: what an external reference stands for.
    Raises InterchangeError, naming `what`, where other names are asked for, and for damaged streams.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise InterchangeError(f"{what} holds a pickle of {len(data):,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    try:
        return _Unpickler(data, names, what, persistent or _no_reference).load()
    except InterchangeError:
        raise
    except _DAMAGES as error:  # a stream that is damaged or made to harm ends in one of these
        raise InterchangeError(f"{what} is damaged or no pickle ({type(error).__name__}: {error})") from error


def _no_reference(pid: Any) -> Any:
    raise pickle.UnpicklingError("a reference out of the pickle")


class _Dict(dict):
    """Stands for an OrderedDict."""

    def __setstate__(self, state: Any) -> None:
        """Attributes (the versions in a state dict) are dropped; they would hide methods."""


def _ordered_dict(items: list | tuple = ()) -> _Dict:
    if not isinstance(items, list | tuple):  # an array would become Python objects, a hundred bytes for each of its own
        raise TypeError("a dict of something else than a list of pairs")
    return _Dict(items)


def _size(numbers: list | tuple = ()) -> tuple:
    if not isinstance(numbers, list | tuple):
        raise TypeError("a size of something else than numbers")
    return tuple(numbers)


# --- .pt files -------------------------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    """The tree that `torch.save` wrote, tensors as read-only NumPy arrays (bfloat16 as `ml_dtypes.bfloat16`).

    Raises InterchangeError, naming the file and the reason, for damaged and truncated files, compressed entries (zip
    bombs), claims beyond the file's size, and pickles that ask for anything but tensors and plain containers.
    """
    path = Path(path)
    with open(path, "rb") as file:
        if file.read(len(_LEGACY)) == _LEGACY:
            raise InterchangeError(
                f"{path} has torch's old format (before 1.6), which is not read here. Where torch is installed, "
                "convert it: x = torch.load(path, weights_only=True); torch.save(x, path)"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            return _TorchFile(path, archive).tree()
    except InterchangeError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OSError) as error:
        raise InterchangeError(f"{path} is no file of torch.save, or damaged ({error}); fetch it again") from error


class _Storage(NamedTuple):
    key: str
    dtype: str  # a key of _STORAGES: NumPy's own dtypes stay out of a pickle's reach
    count: int


class _TorchFile:
    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive, self.stored = path, archive, dict[str, bytes]()
        entries, size = archive.infolist(), path.stat().st_size
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise InterchangeError(
                    f"{path}: {entry.filename!r} is compressed ({entry.compress_size:,} bytes that claim to be "
                    f"{entry.file_size:,}); torch.save never compresses: refused"
                )
        if (total := sum(entry.file_size for entry in entries)) > size:
            raise InterchangeError(f"{path} has {size:,} bytes, its entries claim {total:,}: refused")
        self.names = {entry.filename for entry in entries}
        if len(self.names) < len(entries):
            raise InterchangeError(f"{path} has two entries of one name: refused")
        pickled = [name for name in self.names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise InterchangeError(f"{path} has no data.pkl: it is a zip file, but not one of torch.save")
        self.root = pickled[0].removesuffix("data.pkl")
        if self.root + "byteorder" in self.names and self.record("byteorder") != b"little":
            raise InterchangeError(f"{path} was saved on a big-endian machine, which is not read here")

    def record(self, name: str) -> bytes:
        """The bytes of an entry; `zipfile` compares its checksum."""
        if self.root + name not in self.names:
            raise InterchangeError(f"{self.path} has no entry {name!r}, which its tensors need: it is damaged")
        try:
            return self.archive.read(self.root + name)
        except (RuntimeError, zipfile.BadZipFile, EOFError) as error:  # encrypted, a wrong checksum or header, cut off
            raise InterchangeError(f"{self.path}: {name!r} is damaged ({error}); fetch the file again") from error

    def tree(self) -> Any:
        names = {
            "collections.OrderedDict": lambda *items: _ordered_dict(*items),
            "torch._utils._rebuild_tensor_v2": lambda *arguments: self.tensor(*arguments),
            "torch._utils._rebuild_parameter": lambda data, *rest: data,
            "torch.Size": lambda *numbers: _size(*numbers),
            **{name: name for name in _STORAGES},
        }
        return unpickle(self.record("data.pkl"), names, str(self.path), self.storage)

    def storage(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", str() as dtype, str() as key, str(), int() as count) if dtype in _STORAGES:
                return _Storage(key, dtype, count)
        raise InterchangeError(f"{self.path} refers to something that is no storage of numbers: refused")

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> np.ndarray:
        if not isinstance(storage, _Storage) or not all(isinstance(x, int) for x in (offset, *shape, *strides)):
            raise InterchangeError(f"{self.path}: a tensor is not described as torch does it: refused")
        if len(shape) != len(strides) or min((offset, storage.count, *shape, *strides)) < 0:
            raise InterchangeError(f"{self.path}: a tensor has shape {shape} and strides {strides}: refused")
        if storage.key not in self.stored:
            self.stored[storage.key] = self.record(f"data/{storage.key}")
        data, dtype = self.stored[storage.key], _STORAGES[storage.dtype]
        have, size = len(data) // dtype.itemsize, math.prod(shape)
        reach = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if size else 0
        if storage.count > have or reach > have or size > have:
            raise InterchangeError(
                f"{self.path}: a tensor of shape {tuple(shape)} claims {max(storage.count, reach, size):,} numbers, "
                f"but data/{storage.key} holds {have:,}: refused"
            )
        flat, steps = np.frombuffer(data, dtype, have), tuple(stride * dtype.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(flat[offset:], tuple(shape), steps, writeable=False)


def write(file: BinaryIO, value: Mapping[str, np.ndarray] | np.ndarray) -> None:
    """Writes what `torch.save` would of a state dict or of one tensor; `torch.load(..., weights_only=True)` reads it.

    Arrays are float32 or int32 and are stored contiguous.
    """
    arrays = list(value.values()) if isinstance(value, Mapping) else [value]
    described = [_Tensor(i, array) for i, array in enumerate(arrays)]
    tree = OrderedDict(zip(value, described, strict=True)) if isinstance(value, Mapping) else described[0]
    data = io.BytesIO()
    _Pickler(data, protocol=2).dump(tree)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def put(name: str, data: Any) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=len(data) >= 1 << 31) as out:
                out.write(data)

        put("data.pkl", data.getvalue())
        put("byteorder", b"little")
        for i, array in enumerate(arrays):
            put(f"data/{i}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        put("version", b"3\n")


class _Tensor(NamedTuple):
    key: int
    array: np.ndarray


class _Global(NamedTuple):
    """A function or class of torch, which need not be installed, by its name."""

    module: str
    name: str

    def __call__(self) -> None:
        """Never called: only what can be is pickled as a function."""


class _Pickler(pickle._Pickler):
    """Pickles a tensor as a call of torch's function that makes it: (storage, offset, shape, strides, requires_grad,
    hooks)."""

    write: Any
    memoize: Any

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _Global("torch", obj.dtype), obj.key, "cpu", obj.count

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        array = obj.array
        storage = _Storage(
            str(obj.key), {"float32": "FloatStorage", "int32": "IntStorage"}[array.dtype.name], array.size
        )
        strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        return _Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, array.shape, strides, False, OrderedDict())

    def save_name(self, obj: _Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    dispatch: Any = {**pickle._Pickler.dispatch, _Global: save_name}


# --- tokenizer.pkl ---------------------------------------------------------------------------------------------------


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.pkl`, a pickled tiktoken `Encoding`. Raises InterchangeError, naming the file, for
    anything else.

    Bos is `<|bos|>`, or `<|endoftext|>` where there is none.
    """

    class Encoding:
        state: Any = None

        def __setstate__(self, state: Any) -> None:
            self.state = state

    with open(path, "rb") as file:
        data = file.read(MAX_PICKLE_BYTES + 1)
    encoding = unpickle(data, {"tiktoken.core.Encoding": Encoding}, str(path))
    state = encoding.state if type(encoding) is Encoding else None
    if isinstance(state, str):
        return Tokenizer.from_tiktoken(state)  # a stock encoding is pickled by its name
    fields = ("mergeable_ranks", "special_tokens", "pat_str")
    if not isinstance(state, dict) or not set(fields) <= state.keys():
        raise InterchangeError(f"{path} does not hold a tiktoken encoding with {', '.join(fields)}")
    ranks, special, pattern = (state[name] for name in fields)
    return _tokenizer(ranks, special, pattern, path)


def _tokenizer(ranks: Any, special: Any, pattern: Any, path: Path) -> Tokenizer:
    fits = (
        isinstance(ranks, dict)
        and isinstance(special, dict)
        and isinstance(pattern, str)
        and all(isinstance(k, bytes) and isinstance(v, int) for k, v in ranks.items())
        and all(isinstance(k, str) and isinstance(v, int) for k, v in special.items())
    )
    if not fits:
        raise InterchangeError(f"{path}: the fields of its encoding have other types than tiktoken's")
    tokens = sorted(ranks, key=lambda token: ranks[token])
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise InterchangeError(f"{path}: its token ids have gaps, which is not supported")
    try:
        return Tokenizer(tokens, special, pattern, bos=BOS if BOS in special else "<|endoftext|>")
    except (TokenizerError, ValueError) as error:
        raise InterchangeError(f"{path}: {error}") from error


def tokenizer_bytes(tokenizer: Tokenizer) -> bytes:
    """The bytes of a `tokenizer.pkl` that the reference loads: an `Encoding` named rustbpe."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.ranks)}
    special = dict(tokenizer.special_tokens)
    encoding = tiktoken.Encoding("rustbpe", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=special)
    return pickle.dumps(encoding, protocol=4)
