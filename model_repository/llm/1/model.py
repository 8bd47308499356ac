"""Triton's python backend starts here; the work is in triton_models/llm.py."""

from triton_models.llm import TritonPythonModel

__all__ = ["TritonPythonModel"]
