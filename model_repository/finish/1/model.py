"""Triton's python backend starts here; the work is in triton_models/finish.py."""

from triton_models.finish import TritonPythonModel

__all__ = ["TritonPythonModel"]
