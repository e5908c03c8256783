"""What people run on a CPU instead of PyTorch: OpenVINO and ONNX Runtime, with the same weights.

Both towers are exported from our model as `miniclip export` does it, for any batch and texts of any length. OpenVINO
computes in float32 or bf16, or in int8 after NNCF has calibrated it; ONNX Runtime in float32, or in int8 whose
activations are scaled by each batch (it has no bf16 on x86). Their threads sleep while they wait, like everybody's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import openvino
import peers
import samples
import torch
from contenders import RIVALS

import miniclip
from miniclip.config import CLIPConfig
from miniclip.fast.packed_texts import trim_text
from miniclip.inference.exporting.onnx_files import shrink_onnx, write_onnx
from miniclip.inference.exporting.runner import own_signal_stack
from miniclip.inference.exporting.towers import towers

Tower = Callable[[np.ndarray], np.ndarray]
_CALIBRATION = 16  # samples
os.environ.setdefault("NNCF_CI", "1")  # else it tells Intel's servers that it was used


class Engine(NamedTuple):
    library: str
    precision: str


ENGINES = {
    "OpenVINO": Engine("openvino", "float32"),
    "OpenVINO bf16": Engine("openvino", "bf16"),
    **({"OpenVINO int8": Engine("openvino", "int8")} if importlib.util.find_spec("nncf") else {}),  # which is optional
    "ONNX Runtime": Engine("onnxruntime", "float32"),
    "ONNX Runtime int8": Engine("onnxruntime", "int8"),
}
assert set(ENGINES) <= set(RIVALS)


def open_engine(name: str, tower: str, config: CLIPConfig, folder: Path) -> Tower:
    """An image tower, (N, 3, R, R) float32 -> (N, E), or a text tower, (N, L) int64 -> (N, E).

    Args:
        name: of `ENGINES`.
        tower: "image" or "text".
        folder: where files are made that are not there yet.
    """
    engine, threads = ENGINES[name], torch.get_num_threads()
    if engine.library == "onnxruntime":
        return _onnxruntime(_onnx_file(tower, config, folder, engine.precision), threads)
    return _openvino(_openvino_model(tower, config, folder, engine.precision), engine.precision, threads)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _onnx_file(tower: str, config: CLIPConfig, folder: Path, precision: str = "float32") -> Path:
    path = folder / f"{peers.file_name(config)}-{tower}-{precision}.onnx"
    if path.is_file():
        return path
    if precision == "int8":
        shrink_onnx(_onnx_file(tower, config, folder), path, "int8")
    else:
        (wanted,) = (each for each in towers(peers.ours(config, folder)) if each.name == tower)
        write_onnx(wanted, path)
    return path


def _openvino_model(tower: str, config: CLIPConfig, folder: Path, precision: str) -> Any:
    source = openvino.Core().read_model(_onnx_file(tower, config, folder))
    if precision != "int8":
        return source
    path = folder / f"{peers.file_name(config)}-{tower}-int8.xml"
    if not path.is_file():
        openvino.save_model(_quantized(source, _example(tower, config)), path, compress_to_fp16=False)
    return openvino.Core().read_model(path)


def _quantized(model: openvino.Model, example: np.ndarray) -> openvino.Model:
    with peers.no_log(), contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        import nncf

        return nncf.quantize(
            model,
            nncf.Dataset([example]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=1,
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),  # half of its time
        )


def _example(tower: str, config: CLIPConfig) -> np.ndarray:
    """Inputs of the same kind as the timed ones, and not those."""
    if tower == "image":
        side = config.vision.image_size
        return torch.randn(_CALIBRATION, 3, side, side, generator=torch.Generator().manual_seed(1)).numpy()
    return padded_ids(samples.captions(_CALIBRATION, seed=1), config)


def padded_ids(texts: list[str], config: CLIPConfig) -> np.ndarray:
    """(N, L) int64, padded to the longest text, as tokenizers that come with such towers do."""
    return trim_text(miniclip.tokenize(texts), config.text.eot_token).long().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Libraries


def _onnxruntime(path: Path, threads: int) -> Tower:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


@cache
def _core() -> openvino.Core:
    return openvino.Core()


def _openvino(model: Any, precision: str, threads: int) -> Tower:
    # A graph in int8 computes the rest in float32.
    hints = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "INFERENCE_NUM_THREADS": threads}
    with own_signal_stack():
        compiled = _core().compile_model(model, "CPU", hints)
    return lambda x: compiled(x)[0]
