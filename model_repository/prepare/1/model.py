"""Triton's python backend starts here; the work is in triton_models/prepare.py."""

from triton_models.prepare import TritonPythonModel

__all__ = ["TritonPythonModel"]
