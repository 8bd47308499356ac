"""Call Triton for the gateway: the only package that imports Triton's client.

client       see, attend, generate and probe, with the gateway's own types
calls        gRPC calls in flight, and how they end
streams      why a call is not cancelled, and how a stream is ended instead
codec        the gateway's values as Triton's messages, and back
contract     the models that the gateway calls, and their tensors
errors       gRPC's errors as GlimpseError
engines      how much the models process at once, from their configurations
"""

from service.triton.client import TritonClient
from service.triton.contract import CALLED
from service.triton.engines import read_engines

__all__ = ["CALLED", "TritonClient", "read_engines"]
