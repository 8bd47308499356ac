"""Convert Triton's tensors to NumPy arrays and back through DLPack.

The stub that Triton 2.51 bundles was built before NumPy 2 and misreads its arrays: `as_numpy()` and
`Tensor(name, array)` return nothing or garbage. DLPack has one layout for all versions. It has no strings, so text is
sent as UINT8.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from onnxruntime import OrtValue

Array = npt.NDArray[Any]

_set_destructor = ctypes.pythonapi.PyCapsule_SetDestructor
_set_destructor.argtypes = (ctypes.py_object, ctypes.c_void_p)

_CPU = (1, 0)  # DLPack's kDLCPU and the device's number


class _OnCpu:
    """Wrap an input tensor and ignore NumPy's DLPack arguments.

    The stub refuses those arguments with an error, and building its text costs 6 us.
    """

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return self._tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU


def read(tensor: Any) -> Array:
    """Return a view of an input tensor, valid until `execute` returns."""
    return np.from_dlpack(_OnCpu(tensor))


def borrow(tensor: Any) -> OrtValue:
    """Return an input tensor in place, on the host or on a GPU, valid until `execute` returns."""
    return OrtValue.from_dlpack(tensor)


def write(name: str, array: Array) -> Any:
    """Make an output tensor that owns the array."""
    if array.size == 0:  # from_dlpack refuses an empty array as not contiguous, and there is nothing to misread
        return pb_utils.Tensor(name, array)
    usable = array if array.flags.carray else np.require(array, requirements=("C", "W"))
    return _handed_over(name, usable.__dlpack__())


def lend(name: str, value: OrtValue) -> Any:
    """Make an output tensor that owns the value's memory, on the host or on a GPU. It must not be empty."""
    return _handed_over(name, value.__dlpack__())


def _handed_over(name: str, capsule: Any) -> Any:
    # The stub takes over and frees the memory, but leaves the capsule a name that NumPy's destructor rejects.
    _set_destructor(capsule, None)
    return pb_utils.Tensor.from_dlpack(name, capsule)
