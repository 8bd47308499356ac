"""Serve the same checkpoint with LitServe and its batching: the system `litserve`.

    python -m benchmarks.bench.litserve_server CHECKPOINT PORT

One worker; PyTorch with its default number of threads, one per core; batches of up to MAX_BATCH that wait 10 ms to
fill.
"""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve

from benchmarks.bench.torch_model import TorchModel

MAX_BATCH = 16
BATCH_TIMEOUT_S = 0.01


class Vqa(litserve.LitAPI):
    """Answer a batch as a whole; its longest answer sets the time of all."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S)
        self._checkpoint = checkpoint

    def setup(self, device: str) -> None:  # noqa: ARG002  (LitServe passes it by name)
        self._model = TorchModel.load(self._checkpoint)

    def decode_request(self, request):
        return base64.b64decode(request["image"]), request["question"], request["max_tokens"]

    def batch(self, inputs: list[tuple[bytes, str, int]]) -> list[tuple[bytes, str, int]]:
        return inputs

    def predict(self, asked: list[tuple[bytes, str, int]]) -> list[tuple[str, int]]:
        images, questions, max_tokens = zip(*asked, strict=True)
        return self._model.answer(images, questions, max(max_tokens))

    def unbatch(self, output: list[tuple[str, int]]) -> list[tuple[str, int]]:
        return output

    def encode_response(self, output: tuple[str, int]) -> dict[str, Any]:
        return {"answer": output[0], "tokens": output[1]}


def main() -> None:
    checkpoint, port = sys.argv[1:]
    server = litserve.LitServer(Vqa(checkpoint), accelerator="cpu", timeout=300, restart_workers=False)
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
