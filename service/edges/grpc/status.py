"""Tell a failed call's caller what went wrong, as google.rpc.Status."""

from __future__ import annotations

from typing import NoReturn

import grpc  # type: ignore[import-untyped]
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from service.core.errors import GlimpseError, InvalidRequest, NotFound, Overloaded, TooLarge, status_of
from service.edges.caller import TRACE_ID_KEY

DOMAIN = "glimpse.v1"  # of the codes in ErrorInfo
DETAILS_KEY = "grpc-status-details-bin"


async def abort(context: grpc.aio.ServicerContext, error: GlimpseError, trace_id: str) -> NoReturn:
    """End the call with the error's status and details. Raises gRPC's AbortError, which belongs to gRPC's server."""
    status = status_proto(error, trace_id)
    await context.abort(
        grpc.StatusCode[status_of(error)[1]],
        error.message,
        ((TRACE_ID_KEY, trace_id), (DETAILS_KEY, status.SerializeToString())),
    )
    raise AssertionError("abort returned")


def status_proto(error: GlimpseError, trace_id: str) -> status_pb2.Status:
    """Return the error as a google.rpc.Status.

    ErrorInfo's reason is the error's code, the same as in HTTP. BadRequest names the field at fault. RetryInfo says
    when there may be room.
    """
    number, _ = grpc.StatusCode[status_of(error)[1]].value
    details = [
        error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN, metadata={"type": error.type}),
        error_details_pb2.RequestInfo(request_id=trace_id),
    ]
    if error.param is not None and isinstance(error, InvalidRequest | TooLarge | NotFound):
        fault = error_details_pb2.BadRequest.FieldViolation(field=error.param, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[fault]))
    if isinstance(error, Overloaded):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1e3))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=number, message=error.message, details=[packed(each) for each in details])


def packed(detail: object) -> any_pb2.Any:
    wrapped = any_pb2.Any()
    wrapped.Pack(detail)
    return wrapped
