"""Ask Triton itself, without the gateway: GLIMPSE_TRITON_GRPC_PORT=8001 glimpse serve; python3 examples/kserve.py

The model `vqa` is the whole chain. It needs `python3 -m pip install "tritonclient[grpc]"` and no part of Glimpse.
Triton has neither caches nor admission: this way is for clients of KServe v2 that are there already.
"""

import queue
import sys
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
inputs = {
    "image_bytes": np.fromfile(Path("benchmarks/scenes/new_003.webp"), np.uint8),
    "question": np.frombuffer(b"describe the image.", np.uint8),
    "max_tokens": np.array([64], np.int32),
}
tensors = []
for name, values in inputs.items():
    tensor = InferInput(name, [1, len(values)], "INT32" if values.dtype == np.int32 else "UINT8")
    tensor.set_data_from_numpy(values[np.newaxis])
    tensors.append(tensor)

responses = queue.SimpleQueue()
with InferenceServerClient(address) as triton:
    triton.start_stream(lambda result, error: responses.put((result, error)), stream_timeout=60)
    triton.async_stream_infer("vqa", tensors, enable_empty_final_response=True)
    while True:
        result, error = responses.get()
        if error is not None:
            sys.exit(str(error))
        if (piece := result.as_numpy("answer")) is not None:
            print(piece.tobytes().decode(), end="", flush=True)
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
print()
