"""PyTorch's `.pt` files (zip form) in and out, without PyTorch and without executing their pickles.

    <name>/data.pkl        the tree: containers, and for each tensor its storage, offset, shape and strides
    <name>/data/<key>      the bytes of one storage
    <name>/byteorder, <name>/version

Everything a file claims is held against its real size before anything is allocated: tensors are views of what was
read until they are cast.
"""

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from nanochat_jax.convert import InterchangeError, pickles

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number as a pickle: files before torch 1.6
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_STORAGES = {
    "torch.FloatStorage": np.dtype("<f4"), "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.HalfStorage": np.dtype("<f2"), "torch.DoubleStorage": np.dtype("<f8"), "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"), "torch.ShortStorage": np.dtype("<i2"), "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"), "torch.BoolStorage": np.dtype("?"),
}  # fmt: skip


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


def read(path: Path) -> Any:
    """The tree that `torch.save` wrote, tensors as read-only NumPy arrays (bfloat16 as `ml_dtypes.bfloat16`).

    Raises InterchangeError, naming the file and the reason, for damaged and truncated files, compressed entries (zip
    bombs), claims beyond the file's size, and pickles that ask for anything but tensors and plain containers.
    """
    path = Path(path)
    with open(path, "rb") as file:
        beginning = file.read(len(_LEGACY))
    if beginning == _LEGACY:
        raise InterchangeError(
            f"{path} has torch's old format (before 1.6), which is not read here. Where torch is installed, convert "
            "it: x = torch.load(path, weights_only=True); torch.save(x, path)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise InterchangeError(f"{path} is no file of torch.save, or truncated ({error}); fetch it again") from error
    return _Archive(path, entries).tree()


class _Archive:
    def __init__(self, path: Path, entries: list[zipfile.ZipInfo]):
        self.path, self.size, self.entries = path, path.stat().st_size, {}
        total = 0
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise InterchangeError(
                    f"{path}: {entry.filename!r} is compressed ({entry.compress_size:,} bytes that claim to be "
                    f"{entry.file_size:,}); torch.save never compresses: refused"
                )
            if entry.flag_bits & 1 or entry.filename in self.entries:
                raise InterchangeError(f"{path}: {entry.filename!r} is encrypted or there twice: refused")
            total += entry.file_size
            self.entries[entry.filename] = entry
        if total > self.size:
            raise InterchangeError(f"{path} has {self.size:,} bytes, its entries claim {total:,}: refused")
        pickled = [name for name in self.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise InterchangeError(f"{path} has no data.pkl: it is a zip file, but not one of torch.save")
        self.root = pickled[0].removesuffix("data.pkl")
        if self.root + "byteorder" in self.entries and self.record("byteorder") != b"little":
            raise InterchangeError(f"{path} was saved on a big-endian machine, which is not read here")

    def record(self, name: str) -> bytes:
        """The bytes of an entry, checked against its checksum."""
        entry = self.entries.get(self.root + name)
        if entry is None:
            raise InterchangeError(f"{self.path} has no entry {name!r}, which its tensors need: it is damaged")
        with open(self.path, "rb") as file:
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
                raise InterchangeError(f"{self.path}: the header of {name!r} is damaged; fetch the file again")
            _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            file.seek(name_length + extra_length, os.SEEK_CUR)
            data = file.read(entry.file_size)  # no more than the file has: its entries together fit it
        if len(data) < entry.file_size:
            raise InterchangeError(f"{self.path}: {name!r} claims {entry.file_size:,} bytes beyond the file's end")
        if zlib.crc32(data) != entry.CRC:
            raise InterchangeError(
                f"{self.path}: the checksum of {name!r} is wrong: the file is damaged; fetch it again"
            )
        return data

    def tree(self) -> Any:
        names = {
            "collections.OrderedDict": lambda *items: dict(*items),
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, *rest: data,
            "torch.Size": tuple,
            **dict.fromkeys(_STORAGES),
        }
        self.read: dict[str, bytes] = {}
        return pickles.read(self.record("data.pkl"), names, str(self.path), self.storage)

    def storage(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", pickles.Name() as name, str() as key, str(), int() as count) if str(name) in _STORAGES:
                return _Storage(key, _STORAGES[str(name)], count)
        raise InterchangeError(f"{self.path} refers to something that is no storage of numbers: refused")

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> np.ndarray:
        if not isinstance(storage, _Storage) or not all(isinstance(x, int) for x in (offset, *shape, *strides)):
            raise InterchangeError(f"{self.path}: a tensor is not described as torch does it: refused")
        if len(shape) != len(strides) or min((offset, storage.count, *shape, *strides)) < 0:
            raise InterchangeError(f"{self.path}: a tensor has shape {shape} and strides {strides}: refused")
        if storage.key not in self.read:
            self.read[storage.key] = self.record(f"data/{storage.key}")
        data = self.read[storage.key]
        have, size = len(data) // storage.dtype.itemsize, math.prod(shape)
        reach = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if size else 0
        if storage.count > have or reach > have or size > have:
            raise InterchangeError(
                f"{self.path}: a tensor of shape {tuple(shape)} claims {max(storage.count, reach, size):,} numbers, "
                f"but data/{storage.key} holds {have:,}: refused"
            )
        flat = np.frombuffer(data, storage.dtype, have)
        itemsize = storage.dtype.itemsize
        return np.lib.stride_tricks.as_strided(
            flat[offset:], tuple(shape), tuple(s * itemsize for s in strides), writeable=False
        )


def write(file: BinaryIO, value: Mapping[str, np.ndarray] | np.ndarray) -> None:
    """Writes what `torch.save` would of a state dict or of one tensor; `torch.load(..., weights_only=True)` reads it.

    Arrays are float32 or int32 and are stored contiguous.
    """
    arrays = list(value.values()) if isinstance(value, Mapping) else [value]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def put(name: str, data: Any) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=len(data) >= 1 << 31) as out:
                out.write(data)

        put("data.pkl", _pickle(value))
        put("byteorder", b"little")
        for i, array in enumerate(arrays):
            put(f"data/{i}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        put("version", b"3\n")


def _pickle(value: Mapping[str, np.ndarray] | np.ndarray) -> bytes:
    p = pickles.Writer()
    if not isinstance(value, Mapping):
        _tensor(p, 0, value)
        return p.done()
    p.name("collections", "OrderedDict").mark().tuple().reduce().mark()
    for i, (name, array) in enumerate(value.items()):
        _tensor(p.text(name), i, array)
    return p.set_items().done()


def _tensor(p: "pickles.Writer", key: int, array: np.ndarray) -> None:
    """A call of torch's rebuilding function: (storage, offset, shape, strides, requires_grad, hooks)."""
    kind = {"float32": "FloatStorage", "int32": "IntStorage"}[array.dtype.name]
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    p.name("torch._utils", "_rebuild_tensor_v2").mark()
    p.mark().text("storage").name("torch", kind).text(str(key)).text("cpu").integer(array.size).tuple().persistent_id()
    p.integer(0)
    for numbers in (array.shape, strides):
        p.mark()
        for number in numbers:
            p.integer(number)
        p.tuple()
    p.false().name("collections", "OrderedDict").mark().tuple().reduce().tuple().reduce()
