"""Stands where Triton's python backend puts its module of this name: the part that triton_models uses, in memory.

pytest puts this folder on the path, so `import triton_python_backend_utils` finds it; real Triton is tried in
test_embedded.py and test_vqa_ensemble.py.
"""

import json
import queue
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonError(Exception):
    INTERNAL, INVALID_ARG, UNAVAILABLE = "INTERNAL", "INVALID_ARG", "UNAVAILABLE"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self.code = code

    def message(self) -> str:
        return str(self)


class Logger:
    """Triton's log; what goes wrong shows in the answers too."""

    @staticmethod
    def log_warn(message: str) -> None: ...

    @staticmethod
    def log_error(message: str) -> None: ...


class Metric:
    def __init__(self, labels: dict[str, str]) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = value

    def increment(self, value: float) -> None:
        assert value >= 0
        self.value += value


class MetricFamily:
    GAUGE, COUNTER = "GAUGE", "COUNTER"
    latest: ClassVar[dict[str, Metric]] = {}  # by name
    every: ClassVar[list[tuple[str, dict[str, str], Metric]]] = []  # name, labels

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name

    def Metric(self, labels: dict[str, str]) -> Metric:
        self.latest[self.name] = Metric(labels)
        self.every.append((self.name, labels, self.latest[self.name]))
        return self.latest[self.name]


class Tensor:
    """As in Triton 2.51, whose stub cannot be trusted with NumPy 2's arrays: DLPack is the way in and out."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    @classmethod
    def from_dlpack(cls, name: str, capsule: object) -> "Tensor":
        return cls(name, np.from_dlpack(Capsule(capsule)))

    def name(self) -> str:
        return self._name

    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    def __dlpack__(self, **wishes: object) -> object:
        return self._array.__dlpack__(**wishes)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


@dataclass
class Capsule:
    """What numpy.from_dlpack wants around a bare capsule."""

    capsule: object

    def __dlpack__(self, **_: object) -> object:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.outputs = {tensor.name(): np.from_dlpack(tensor) for tensor in output_tensors or []}
        self.error = error

    def has_error(self) -> bool:
        return self.error is not None


@dataclass
class ResponseSender:
    """Collects a decoupled request's responses; a test waits for them in order."""

    cancelled: bool = False
    broken: bool = False  # sending raises, as it does once Triton has dropped the request
    sent: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self.broken:
            raise RuntimeError("the request is gone")
        self.sent.put((response, bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)))

    def is_cancelled(self) -> bool:
        return self.cancelled

    def next(self) -> tuple[InferenceResponse | None, bool]:
        return self.sent.get(timeout=20)


class InferenceRequest:
    def __init__(
        self, inputs: dict[str, np.ndarray], outputs: list[str], request_id: str = "", **parameters: str
    ) -> None:
        # Triton lends memory that may be written: DLPack's plain capsule tells of no other.
        self._inputs = [Tensor(name, np.require(array, requirements="W")) for name, array in inputs.items()]
        self._outputs = outputs
        self._id = request_id
        self._parameters = parameters
        self.sender = ResponseSender()

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def request_id(self) -> str:
        return self._id

    def get_response_sender(self) -> ResponseSender:
        return self.sender


def start_arguments(folder, *, inputs: list[str], outputs: list[str], parameters: dict[str, str] | None = None) -> dict:
    """The `args` of `initialize` for the model in `folder`."""
    config = {
        "max_batch_size": 8,
        "input": [{"name": name} for name in inputs],
        "output": [{"name": name} for name in outputs],
        "parameters": {name: {"string_value": value} for name, value in (parameters or {}).items()},
    }
    return {"model_repository": str(folder), "model_version": "1", "model_config": json.dumps(config)}
