"""The proto, its stubs and the handlers belong together."""

import runpy

from google.protobuf import descriptor_pb2

from service.edges.grpc.calls import Calls
from service.edges.grpc.server import VisualQuestionAnswering
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.http.schema import FILES, UploadedImage, VqaAnswer, VqaRequest
from tests.support.fakes import House
from tests.support.paths import PROJECT

STUBS = PROJECT / "service" / "edges" / "grpc" / "stubs"
SERVICE = pb.DESCRIPTOR.services_by_name["VisualQuestionAnswering"]


def test_make_proto_would_change_nothing():
    made = runpy.run_path(str(PROJECT / "scripts" / "write_stubs.py"))["stubs"]()
    assert made == {path.name: path.read_text() for path in STUBS.glob("*_pb2*.py*")}
    assert len(made) == 3


def test_every_method_has_a_handler_that_streams_as_the_proto_says():
    house = House()
    handlers = VisualQuestionAnswering(house.rpc, Calls(house.rpc)).handlers()
    house.reader.close()
    described = descriptor_pb2.ServiceDescriptorProto()
    SERVICE.CopyToProto(described)
    assert {method.name: method.server_streaming for method in described.method} == {
        name: handler.response_streaming for name, handler in handlers.items()
    }


def test_a_question_has_the_fields_of_http():
    """Images and videos stand in the parts, a call has a deadline, streams are a method. OpenAI's chat has `system`."""
    of_http = VqaRequest.model_fields.keys() - {*FILES, "images", "question", "timeout_s", "stream"}
    assert set(pb.AnswerRequest.DESCRIPTOR.fields_by_name) == of_http | {"parts", "system"}


def test_an_answer_has_the_fields_of_http():
    renamed = {"reason": "abstain_reason"}  # beside finish_reason in a message, it says of what
    http = {renamed.get(name, name) for name in VqaAnswer.model_fields}
    assert set(pb.AnswerResponse.DESCRIPTOR.fields_by_name) == http
    for name in ("usage", "vision", "timing_ms"):
        fields = pb.AnswerResponse.DESCRIPTOR.fields_by_name[name].message_type.fields_by_name
        assert set(fields) == VqaAnswer.model_fields[name].annotation.model_fields.keys()
    assert set(pb.PutImageResponse.DESCRIPTOR.fields_by_name) == UploadedImage.model_fields.keys()
