"""The gateway's side of Triton, and the only package that knows Triton's client.

client       see, attend, generate and probe, in the gateway's own words
calls        what is in flight on gRPC, and how it ends
streams      why calls go on to their ends, and how streams get there
codec        our values as Triton's messages, and back
contract     the models that it calls, and their tensors
errors       gRPC's errors as ours
engines      what the models take in at once
"""

from service.triton.client import TritonClient
from service.triton.contract import CALLED
from service.triton.engines import read_engines

__all__ = ["CALLED", "TritonClient", "read_engines"]
