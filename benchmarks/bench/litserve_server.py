"""`litserve`: LitServe with batching on the same checkpoint.

    python -m benchmarks.bench.litserve_server CHECKPOINT PORT [THREADS] [MAX_BATCH]

One worker, PyTorch on THREADS threads (default 2), batches of up to MAX_BATCH (default 16) that wait 10 ms to fill.
"""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve
import torch

from benchmarks.bench.torch_model import TorchModel

BATCH_TIMEOUT_S = 0.01


class Vqa(litserve.LitAPI):
    """A batch is answered as a whole; its longest answer sets the time of all."""

    def __init__(self, checkpoint: str, threads: int, max_batch: int) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=BATCH_TIMEOUT_S)
        self._checkpoint, self._threads = checkpoint, threads

    def setup(self, device: str) -> None:  # noqa: ARG002  (LitServe passes it by name)
        torch.set_num_threads(self._threads)
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
    checkpoint, port, *rest = sys.argv[1:]
    threads, max_batch = (int(rest[i]) if i < len(rest) else default for i, default in enumerate((2, 16)))
    api = Vqa(checkpoint, threads, max_batch)
    server = litserve.LitServer(api, accelerator="cpu", timeout=300, restart_workers=False)
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
