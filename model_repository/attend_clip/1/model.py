"""Triton's python backend starts here; the work is in triton_models/onnx_model.py."""

from triton_models.onnx_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
