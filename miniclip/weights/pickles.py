"""What torch.save and torch.jit.save wrote, read as data: no name in a file reaches a function of Python's.

Both write zip archives of a pickle that describes what was saved, and a record for each tensor; torch.save before 1.6
wrote one stream. OpenAI published CLIP as TorchScript, whose archives hold code besides, which is not looked at. The
closed list of names below is all that a file may ask for; most of them become empty stubs.
"""

from __future__ import annotations

import bisect
import io
import mmap
import os
import pickle
import pickletools
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .layouts import Tensors

Storage = Callable[[str, torch.dtype, int], Tensor]  # the numbers of a key, of a type, so many

_MAX_PICKLE_BYTES = 64 << 20
_STORAGE_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Plain values that training scripts save beside their weights. They are passed over, so an empty stub is enough.
_STUBS: dict[str, tuple[str, ...]] = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "builtins": ("set", "frozenset", "list", "dict", "tuple", "int", "float", "bool", "str", "complex", "bytearray"),
    "collections": ("Counter", "deque"),
    "copyreg": ("_reconstructor",),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath"),
    "uuid": ("UUID",),
    "numpy": ("dtype", "ndarray", "bool_", "float64", "float32", "int64", "int32", "str_"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "numpy.random._pickle": ("__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"),
    "torch": ("device", "Generator"),
    "torch.serialization": ("_get_layout",),
    "torch.torch_version": ("TorchVersion",),
    "torch.cuda.amp.grad_scaler": ("GradScaler",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
    "lightning.pytorch.utilities.parsing": ("AttributeDict",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "lightning.fabric.utilities.data": ("AttributeDict",),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.nodes": ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode"),
    "typing": ("Any",),
    "yacs.config": ("CfgNode",),
    "easydict": ("EasyDict",),
    "addict.addict": ("Dict",),
}


_REASONS = {
    "_rebuild_qtensor": "its weights are quantised, and floating point is needed",
    "_rebuild_sparse_tensor": "its weights are sparse, and dense ones are needed",
    "_rebuild_meta_tensor_no_storage": "its tensors have shapes and no numbers",
    "_rebuild_from_type_v2": "its tensors are of a class of their own, as FSDP2's DTensor and torchao's, and plain "
    "ones are needed (gather or dequantise them)",
}


class ForeignObjectError(ValueError):
    """A file asks for a class or function of a program's own; `name` is its dotted name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"it asks for {name}: only tensors and plain values are read, no pickled models or other objects; save "
            "model.state_dict() alone with the program that wrote it"
        )


class _DamagedError(ValueError):
    """Bytes are missing, or others than those that were written."""


class _Stub:
    """Stands for an object that is of no interest but for its attributes, which may hold tensors."""

    def __init__(self, *args: Any) -> None:
        del args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})

    def __setitem__(self, key: Any, value: Any) -> None:
        """Subclasses of dict are filled item by item."""

    def append(self, value: Any) -> None:
        """Those of list likewise."""

    extend = add = append


class _Unpickler(pickle.Unpickler):
    """Unpickles tensors, containers and stubs, and nothing else."""

    def __init__(self, file: Any, storage: Storage, with_stubs: bool) -> None:
        super().__init__(file)
        self.storage, self.with_stubs = storage, with_stubs

    def find_class(self, module: str, name: str) -> Any:
        if module == "__builtin__":  # Python 2's name, which protocol 2 keeps
            module = "builtins"
        is_stub = module.startswith("__torch__") or name in _STUBS.get(module, ()) or module == "numpy.dtypes"
        if is_stub and self.with_stubs:
            return type("_Stub", (_Stub,), {})  # a new one each time: a file may set attributes of what it is given
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.uint8
        allowed: dict[tuple[str, str], Any] = {
            ("_codecs", "encode"): lambda text, encoding: text.encode("latin-1"),  # how protocol 2 writes bytes
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "defaultdict"): lambda *_: {},
            ("torch", "Size"): lambda *sides: torch.Size(*sides),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _rebuild_tensor(*args),
            ("torch._utils", "_rebuild_tensor_v3"): lambda *args: _rebuild_untyped(*args),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, tag: value,
        }
        if (module, name) not in allowed:
            if name not in _REASONS:
                raise ForeignObjectError(f"{module}.{name}")
            raise ValueError(
                f"it asks for {module}.{name}: {_REASONS[name]}; save model.state_dict() alone with the program that "
                "wrote it"
            )
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _location, count, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(part is not None for part in view):
            raise ValueError(f"it has a record of unknown kind {kind!r}")
        return self.storage(str(key), dtype, int(count))


def _rebuild_tensor(
    storage: Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _grad: Any,
    _hooks: Any,
    bits: Any = None,
) -> Tensor:
    if bits:  # torch's negative or conjugate bit: the numbers are not those that are stored
        raise ValueError(
            "it has a tensor that is a negative or conjugate view; save tensor.resolve_neg().resolve_conj()"
        )
    return torch.as_strided(storage, size, stride, offset)  # raises if it would reach beyond the storage


def _rebuild_untyped(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], grad: Any, hooks: Any, dtype: Any,
    bits: Any = None,
) -> Tensor:  # fmt: skip
    return _rebuild_tensor(storage.view(dtype), offset, size, stride, grad, hooks, bits)


def is_torchscript(path: Path) -> bool:
    try:
        if not zipfile.is_zipfile(path):  # may raise, too
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception as error:  # a damaged directory can raise anything
        raise ValueError(f"{path} is a damaged archive: {error}") from error


def read_torchscript(path: Path) -> Tensors:
    """The parameters and buffers of a TorchScript archive, by their dotted names, mapped from the file.

    Raises:
        ValueError: damaged, compressed (the records of a genuine one are stored), or asking for anything but tensors.
    """
    try:
        module = _read_zip(path)
    except Exception as error:  # a damaged or spiteful pickle can raise anything
        raise _read_error(path, "TorchScript archive", error) from error
    found: Tensors = {}
    _collect_tensors(module, "", found, set())
    return found


def read_pickle(path: Path, with_stubs: bool = True) -> Any:
    """What torch.save wrote, on the CPU: containers and tensors, and of other things stubs, if those will do.

    Raises:
        ValueError: damaged, compressed, or asking for a class or function that is not on the list; names it.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
        return _read_zip(path, with_stubs) if is_zip else _read_stream(path, with_stubs)
    except Exception as error:
        raise _read_error(path, "checkpoint", error) from error


def _read_error(path: Path, kind: str, error: Exception) -> ValueError:
    what = str(error).split("\n")[0][:300]
    if isinstance(error, _DamagedError):
        return ValueError(f"{path} is damaged: {what}; copy or download it again, or take an earlier one")
    return ValueError(f"{path} is not a {kind} that can be read safely: {what}")


def _read_zip(path: Path, with_stubs: bool = True) -> Any:
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            what = f"it is a zip archive of {length:,} bytes without a sound directory at its end"
            raise _DamagedError(f"{what}, as one that was cut short") from error
        records = {info.filename: info for info in archive.infolist()}
        root = next((name for name in records if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("it is a zip archive without a data.pkl")
        root = root.removesuffix("data.pkl")
        for name, info in records.items():
            is_read = name in (f"{root}data.pkl", f"{root}byteorder") or name.startswith(f"{root}data/")
            if is_read and info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its record {name} is compressed, from {info.file_size} bytes")
        mapped = _Mapped(file, length, [info.header_offset for info in records.values()])
        if f"{root}byteorder" in records and mapped.read(records[f"{root}byteorder"]) != b"little":
            raise ValueError("its numbers are big-endian")
        known: dict[tuple[str, torch.dtype, int], Tensor] = {}

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            which = key, dtype, count
            if which not in known:
                if f"{root}data/{key}" not in records:
                    raise _DamagedError(f"it has no record {root}data/{key}")
                known[which] = mapped.record(records[f"{root}data/{key}"], dtype, count)
            return known[which]

        return _unpickle(mapped.read(records[f"{root}data.pkl"]), storage, with_stubs)


class _Mapped:
    """The records of an archive, each checked against its CRC-32, as tensors over a few mappings of the file.

    Each mapping covers neighbouring records, so that its pages leave memory with their tensors. One for each record
    would hold a file descriptor each, and a checkpoint with an optimiser has thousands of records.
    """

    MOST = 64

    def __init__(self, file: IO[bytes], length: int, offsets: list[int]) -> None:
        self.file, self.length = file, length
        self.bounds = [0]
        for offset in sorted(offsets):
            if offset - self.bounds[-1] >= max(1, length // self.MOST):
                self.bounds.append(offset)
        self.mappings: dict[int, mmap.mmap] = {}
        self.places: dict[str, int] = {}  # of the records that were checked
        self.num_checked_bytes = 0

    def read(self, info: zipfile.ZipInfo) -> bytes:
        """The bytes of a small record."""
        if info.file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its record {info.filename} takes {info.file_size} bytes")
        self.file.seek(self._place(info))
        return self.file.read(info.file_size)

    def record(self, info: zipfile.ZipInfo, dtype: torch.dtype, count: int) -> Tensor:
        size = count * dtype.itemsize
        if size > info.file_size:
            raise ValueError(f"its record {info.filename} is shorter than the tensor in it")
        offset = self._place(info)
        if count == 0:
            return torch.empty(0, dtype=dtype)
        which, first, end = self._mapping_of(info)
        first -= first % mmap.ALLOCATIONGRANULARITY
        if which not in self.mappings:
            self.mappings[which] = mmap.mmap(self.file.fileno(), end - first, access=mmap.ACCESS_COPY, offset=first)
        return torch.frombuffer(self.mappings[which], dtype=dtype, count=count, offset=offset - first)

    def _mapping_of(self, info: zipfile.ZipInfo) -> tuple[int, int, int]:
        """Which mapping a record is in, where that begins and where it ends."""
        which = bisect.bisect_right(self.bounds, info.header_offset) - 1
        return which, self.bounds[which], [*self.bounds, self.length][which + 1]

    def _place(self, info: zipfile.ZipInfo) -> int:
        """Where a record's bytes begin.

        Raises:
            ValueError: they are not all there, or not those that were written.
        """
        if info.filename in self.places:
            return self.places[info.filename]
        self.file.seek(max(0, info.header_offset))
        header = self.file.read(30)
        if not header.startswith(b"PK\x03\x04"):
            raise _DamagedError(f"its record {info.filename} is not where its directory says")
        name_size, extra_size = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        offset = info.header_offset + 30 + name_size + extra_size
        if offset + info.file_size > self._mapping_of(info)[2]:
            raise _DamagedError(f"its record {info.filename} is cut short")
        self.num_checked_bytes += info.file_size
        if self.num_checked_bytes > self.length:
            raise ValueError("its records overlap")
        # It is 0 where torch wrote none: torch.serialization.set_crc32_options(False), skip_data.
        if info.CRC and (found := self._crc(offset, info.file_size)) != info.CRC:
            raise _DamagedError(
                f"the CRC-32 of its record {info.filename} ({info.file_size:,} bytes) is {found:08x}, and that of what "
                f"was saved {info.CRC:08x}, unless a program wrote into the file since (torch.load and torch.save then "
                "make a sound one)"
            )
        self.places[info.filename] = offset
        return offset

    def _crc(self, offset: int, size: int) -> int:
        """Read in pieces and not from a mapping, whose pages would stay in memory."""
        self.file.seek(offset)
        piece, crc = memoryview(bytearray(min(size, 1 << 20))), 0
        while size > 0:
            count = self.file.readinto(piece[:size])  # type: ignore[attr-defined]  # IO lacks it
            if not count:
                break
            crc, size = zlib.crc32(piece[:count], crc), size - count
        return crc


def _unpickle(description: bytes, storage: Storage, with_stubs: bool) -> Any:
    for operation, argument, _ in pickletools.genops(description):
        if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(description):
            raise ValueError("it asks for a table larger than itself")
    return _Unpickler(io.BytesIO(description), storage, with_stubs).load()


_MAGIC_NUMBER, _PROTOCOL_VERSION = 0x1950A86A20F9469CFC6C, 1001


def _read_stream(path: Path, with_stubs: bool) -> Any:
    """torch.save's older form: five pickles, the fourth of what was saved, then the numbers of each storage."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        stored: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            if key not in stored:
                if not 0 <= count * dtype.itemsize <= length - sum(each.nbytes for each in stored.values()):
                    raise _DamagedError(f"its tensors are larger than the file, of {length:,} bytes")
                stored[key] = torch.empty(count, dtype=dtype)
            return stored[key]

        if _unpickle(_next_pickle(file), storage, with_stubs) != _MAGIC_NUMBER:
            raise ValueError("it was not written by torch.save")
        try:
            descriptions = [_next_pickle(file) for _ in range(4)]
        except ValueError as error:
            if file.read(1):
                raise
            raise _DamagedError(f"it ends after {length:,} bytes, in its description") from error
        version, _system, saved, keys = (_unpickle(each, storage, with_stubs) for each in descriptions)
        if version != _PROTOCOL_VERSION:
            raise ValueError(f"it is of version {version!r} of torch.save's older form; {_PROTOCOL_VERSION} is read")
        for key in keys:
            tensor = stored[key]
            count = int.from_bytes(file.read(8), "little")
            if count != len(tensor) or file.readinto(tensor.view(torch.uint8).numpy().data) != tensor.nbytes:
                raise _DamagedError(f"it ends after {length:,} bytes, in its storage {key}, or that is of another size")
    return saved


def _next_pickle(file: IO[bytes]) -> bytes:
    """The bytes of the pickle at a file's place, which then stands after it."""
    start = file.tell()
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > _MAX_PICKLE_BYTES:
            raise ValueError("it asks for a table larger than itself")
        if file.tell() - start > _MAX_PICKLE_BYTES:
            raise ValueError(f"its description takes more than {_MAX_PICKLE_BYTES} bytes")
    end = file.tell()
    file.seek(start)
    return file.read(end - start)


def _collect_tensors(module: Any, prefix: str, found: Tensors, seen: set[int]) -> None:
    """The tensors of a module and of those in it; each module once, however many names it has."""
    seen.add(id(module))
    for name, value in vars(module).items() if isinstance(module, _Stub) else ():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Stub) and id(value) not in seen and len(prefix) < 200:
            _collect_tensors(value, f"{prefix}{name}.", found, seen)
