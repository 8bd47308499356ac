"""Triton's python backend starts here; the work is in triton_models/qformer.py."""

from triton_models.qformer import TritonPythonModel

__all__ = ["TritonPythonModel"]
