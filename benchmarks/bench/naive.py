"""`naive`: FastAPI and transformers' `generate`, as one writes it first.

    python -m benchmarks.bench.naive CHECKPOINT PORT [THREADS] [AT_ONCE]

A plain `def` route, which FastAPI runs in its thread pool; PyTorch on THREADS threads (default 2), at most AT_ONCE
requests in the model at a time (default 1): without a bound, 16 threads of Python with two of PyTorch's each would have
to share two cores. Whether 1 is best for it has not been measured.
"""

from __future__ import annotations

import sys
import threading
from typing import Annotated

import torch
import uvicorn
from fastapi import FastAPI, Form, UploadFile

from benchmarks.bench.torch_model import TorchModel


def build(checkpoint: str, at_once: int) -> FastAPI:
    model = TorchModel.load(checkpoint)
    turn = threading.Semaphore(at_once)
    app = FastAPI()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/ask")
    def ask(image: UploadFile, question: Annotated[str, Form()], max_tokens: Annotated[int, Form()]) -> dict:
        data = image.file.read()
        with turn:
            ((text, tokens),) = model.answer([data], [question], max_tokens)
        return {"answer": text, "tokens": tokens}

    return app


def main() -> None:
    checkpoint, port, *rest = sys.argv[1:]
    threads, at_once = (int(rest[i]) if i < len(rest) else default for i, default in enumerate((2, 1)))
    torch.set_num_threads(threads)
    uvicorn.run(build(checkpoint, at_once), host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
