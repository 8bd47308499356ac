"""Import what PyTorch's exporter imports at its first use: 900 modules, seconds of CPU time.

A forkserver that imports this first has them for every process that it forks.
"""

import io
import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.onnx.export(torch.nn.Linear(1, 1).eval(), (torch.zeros(1, 1),), io.BytesIO(), dynamo=True, verbose=False)
