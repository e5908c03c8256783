"""OpenVINO's intermediate representation: an .xml with the graph, and a .bin with the weights beside it."""

from __future__ import annotations

from pathlib import Path


def write_openvino(onnx_file: Path, path: Path, precision: str) -> None:
    """From an ONNX file in float32; with "float16" the weights are stored so, and widened where the processor wants."""
    import openvino

    # Not openvino.convert_model, which tells Intel's servers that it was used.
    openvino.save_model(openvino.Core().read_model(onnx_file), path, compress_to_fp16=precision == "float16")
