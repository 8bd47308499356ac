"""Every kind of error has a status and details by the one table."""

import grpc
import pytest
from google.rpc import error_details_pb2

from service.core.errors import InvalidRequest, NotFound, Overloaded, TooLarge, status_of
from service.edges.grpc.status import DOMAIN, status_proto
from tests.service.core.test_errors import kinds


def details(status, kind):
    found = []
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            found.append(detail)
    return found


@pytest.mark.parametrize("kind", kinds())
def test_every_error_has_its_status_its_code_and_its_request(kind):
    status = status_proto(kind("why"), "trace")
    assert status.code == grpc.StatusCode[status_of(kind("why"))[1]].value[0]
    assert status.message == "why"
    (info,) = details(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, dict(info.metadata)) == (kind.code, DOMAIN, {"type": kind.type})
    (request,) = details(status, error_details_pb2.RequestInfo)
    assert request.request_id == "trace"


@pytest.mark.parametrize("kind", [InvalidRequest, TooLarge, NotFound])
def test_a_field_at_fault_is_named(kind):
    (bad,) = details(status_proto(kind("why", param="turns.0.answer"), ""), error_details_pb2.BadRequest)
    assert [(each.field, each.description) for each in bad.field_violations] == [("turns.0.answer", "why")]
    assert not details(status_proto(kind("why"), ""), error_details_pb2.BadRequest)


@pytest.mark.parametrize("kind", [*kinds(Overloaded), Overloaded])
def test_a_full_service_says_when_to_come_back(kind):
    (retry,) = details(status_proto(kind("full", retry_after_s=2.5), ""), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 2500


def test_no_other_error_says_so():
    for kind in set(kinds()) - {Overloaded, *kinds(Overloaded)}:
        assert not details(status_proto(kind("why"), ""), error_details_pb2.RetryInfo)
