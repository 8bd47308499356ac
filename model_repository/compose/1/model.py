"""Triton's python backend starts here; the work is in triton_models/compose.py."""

from triton_models.compose import TritonPythonModel

__all__ = ["TritonPythonModel"]
