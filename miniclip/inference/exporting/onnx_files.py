"""ONNX files, and how their weights are made smaller.

float16 and bfloat16 are formats of the file: what runs it widens the weights when it opens it, and computes in float32,
so results hardly change and no processor is slower. int8 is another computation: matrix products of 8-bit numbers,
whose activations are rounded by the range of each batch.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .towers import Tower

_FEW = 1024  # elements of a tensor that is not worth shrinking
_MOST_FILE_BYTES = 1_900_000_000  # of one file; protobuf ends at 2 GiB, and larger weights lie in a file beside it


def require(*packages: str, extra: str, what: str) -> None:
    """
    Raises:
        ValueError: one of the packages is missing; says how to install it.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"{what} needs {package}: pip install 'miniclip[{extra}]'") from error


def write_onnx(tower: Tower, path: Path) -> None:
    """float32, as the model is; without the exporter's notes on each node, which quote the code and name its folders.

    Raises:
        ValueError: PyTorch can't export it.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    is_large = sum(each.nbytes for each in tower.module.state_dict().values()) > _MOST_FILE_BYTES
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            tower.module,
            (tower.example,),
            dynamo=True,
            verbose=False,
            input_names=[tower.input],
            output_names=[tower.output],
            dynamic_shapes=(tower.dynamic,),
        )
        assert program is not None  # without a path to write to
        ClearMetadataAndDocStringPass()(program.model)
        program.save(path, external_data=is_large)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks are about its own inner life."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---------------------------------------------------------------------------------------------------------------------
# Smaller


def shrink_onnx(source: Path, out: Path, precision: str) -> None:
    """The same model with weights in "float16", "bfloat16" or "int8"; in "float32" they stay as they are."""
    import onnx

    if precision == "int8":
        _quantize(source, out)
        source = out
    model = onnx.load(source)
    graph, nodes = model.graph, []
    kernels = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    for tensor in list(graph.initializer):
        is_large = (
            precision != "float32" and tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= _FEW
        )
        if is_large and (precision != "int8" or tensor.name in kernels):
            smaller, more = _widened(tensor, precision)
            graph.initializer.remove(tensor)
            graph.initializer.extend(smaller)
            nodes += more
    for node in reversed(nodes):
        graph.node.insert(0, node)
    is_huge = sum(len(each.raw_data) for each in graph.initializer) > _MOST_FILE_BYTES
    onnx.save(model, out, save_as_external_data=is_huge, location=f"{out.name}.data")


def _quantize(source: Path, out: Path) -> None:
    """Weights of matrix products in 8 bits, each column with a scale of its own, and the token embedding."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a pre-processing that the exporter has done
    try:
        quantize_dynamic(
            source,
            out,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            reduce_range=True,  # without VNNI, sums of full 8-bit products overflow and are cut off in silence
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
            use_external_data_format=source.with_name(f"{source.name}.data").exists(),
        )
    finally:
        root.setLevel(level)


def _widened(tensor: Any, precision: str) -> tuple[list[Any], list[Any]]:
    """A smaller tensor, and the operations that give the old one back, more or less, under its old name."""
    import ml_dtypes
    from onnx import TensorProto, helper, numpy_helper

    values, name = numpy_helper.to_array(tensor), f"{tensor.name}.{precision}"
    if precision != "int8":
        narrow = values.astype(np.float16 if precision == "float16" else ml_dtypes.bfloat16)
        if not np.isfinite(narrow.astype(np.float32)).all():
            return [tensor], []  # a weight too large for it
        cast = helper.make_node("Cast", [name], [tensor.name], to=TensorProto.FLOAT)
        return [numpy_helper.from_array(narrow, name)], [cast]
    axes = tuple(range(1, values.ndim))
    scale = np.abs(values).max(axis=axes, keepdims=True) / 127
    scale[scale == 0] = 1
    whole = np.rint(values / scale).astype(np.int8)
    kept = [numpy_helper.from_array(whole, name), numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale")]
    cast = helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT)
    return kept, [cast, helper.make_node("Mul", [f"{name}.float", f"{name}.scale"], [tensor.name])]
