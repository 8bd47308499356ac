"""Serve with FastAPI and transformers' `generate` in the simplest way: the system `naive`.

    python -m benchmarks.bench.naive CHECKPOINT PORT

The route is a plain `def`, which FastAPI runs in its pool of 40 threads. PyTorch has its default number of threads,
one per core.
"""

from __future__ import annotations

import sys
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Form, UploadFile

from benchmarks.bench.torch_model import TorchModel


def build(checkpoint: str) -> FastAPI:
    model = TorchModel.load(checkpoint)
    app = FastAPI()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/ask")
    def ask(image: UploadFile, question: Annotated[str, Form()], max_tokens: Annotated[int, Form()]) -> dict:
        ((text, tokens),) = model.answer([image.file.read()], [question], max_tokens)
        return {"answer": text, "tokens": tokens}

    return app


def main() -> None:
    checkpoint, port = sys.argv[1:]
    uvicorn.run(build(checkpoint), host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
