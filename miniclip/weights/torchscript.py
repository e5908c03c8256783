"""OpenAI's TorchScript archives read as data: their tensors, without running any of their code."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layouts import Tensors

# ---------------------------------------------------------------------------------------------------------------------
# TorchScript archives

_MAX_PICKLE_BYTES = 64 << 20
_STORAGE_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class _Stub:
    """Stands for an object of a class that the archive defines; only its attributes are of interest."""

    def __init__(self, *args: Any) -> None:
        del args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})


class _ArchiveUnpickler(pickle.Unpickler):
    """Unpickles tensors, containers and stubs, and nothing else: no name in the file reaches a function of Python's."""

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype, int], Tensor]) -> None:
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type("_Stub", (_Stub,), {})  # a new one each time: a file may set attributes of what it is given
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _rebuild_tensor(*args),
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, tag: value,
        }
        if (module, name) not in allowed:
            raise ValueError(f"it asks for {module}.{name}, which no CLIP checkpoint needs")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _location, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"it has a record of unknown kind {kind!r}")
        return self.storage(str(key), dtype, int(count))


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # raises if it would reach beyond the storage


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

    OpenAI published CLIP as such archives. They are zip files of a pickle that describes the modules, a record for each
    tensor, and code, which is not looked at.

    Raises:
        ValueError: damaged, compressed (the records of a genuine one are stored), or asking for anything but tensors.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            length = os.fstat(file.fileno()).st_size
            records = {info.filename: info for info in archive.infolist()}
            root = next(name for name in records if name.endswith("/data.pkl")).removesuffix("data.pkl")
            for name, info in records.items():
                is_read = name == f"{root}data.pkl" or name.startswith(f"{root}data/")
                if is_read and info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"its record {name} is compressed, from {info.file_size} bytes")
            if records[f"{root}data.pkl"].file_size > _MAX_PICKLE_BYTES:
                raise ValueError(f"its description of the modules takes {records[f'{root}data.pkl'].file_size} bytes")

            def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
                info = records[f"{root}data/{key}"]
                size = count * torch.empty((), dtype=dtype).element_size()
                if size > info.file_size:
                    raise ValueError(f"its record {info.filename} is shorter than the tensor in it")
                file.seek(max(0, info.header_offset))
                header = file.read(30)
                if not header.startswith(b"PK\x03\x04"):
                    raise ValueError(f"its record {info.filename} is not where its directory says")
                name_size, extra_size = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
                offset = info.header_offset + 30 + name_size + extra_size
                if offset + size > length:
                    raise ValueError(f"its record {info.filename} is cut short")
                if count == 0:
                    return torch.empty(0, dtype=dtype)
                # A mapping of its own for each, so that its pages leave memory with the tensor.
                before = offset % mmap.ALLOCATIONGRANULARITY
                view = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=offset - before)
                return torch.frombuffer(view, dtype=dtype, count=count, offset=before)

            description = archive.read(f"{root}data.pkl")
            for operation, argument, _ in pickletools.genops(description):
                if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(description):
                    raise ValueError("it asks for a table larger than itself")
            module = _ArchiveUnpickler(io.BytesIO(description), storage).load()
    except Exception as error:  # a damaged or spiteful pickle can raise anything
        raise ValueError(f"{path} is not a TorchScript archive that can be read safely: {error}") from error
    found: Tensors = {}
    _collect_tensors(module, "", found, set())
    return found


def _collect_tensors(module: Any, prefix: str, found: Tensors, seen: set[int]) -> None:
    """The tensors of a module and of those in it; each module once, however many names it has."""
    seen.add(id(module))
    for name, value in vars(module).items() if isinstance(module, _Stub) else ():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Stub) and id(value) not in seen and len(prefix) < 200:
            _collect_tensors(value, f"{prefix}{name}.", found, seen)
