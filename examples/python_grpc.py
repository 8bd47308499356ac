"""Ask by gRPC: python3 -m pip install grpcio grpcio-tools; python3 examples/python_grpc.py [HOST:PORT]"""

import sys
from pathlib import Path

import grpc

sys.path.insert(0, "service/edges/grpc/proto")  # the proto; `python3 -m grpc_tools.protoc` writes modules of it too
pb, services = grpc.protos_and_services("glimpse/v1/vqa.proto")

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8081"
scene = Path("benchmarks/scenes/new_003.webp").read_bytes()


def question(image: pb.Part, text: str) -> pb.AnswerRequest:
    return pb.AnswerRequest(parts=[image, pb.Part(text=text)])


with grpc.insecure_channel(address) as channel:
    glimpse = services.VisualQuestionAnsweringStub(channel)

    answer = glimpse.Answer(question(pb.Part(image=scene), "what character is on the pink square?"), timeout=30)
    print(answer.answer, answer.vision.vision_tokens)

    pieces = (pb.PutImageRequest(data=scene[at : at + 65_536]) for at in range(0, len(scene), 65_536))
    image = pb.Part(image_id=glimpse.PutImage(pieces).id)
    for event in glimpse.StreamAnswer(question(image, "describe the image."), timeout=30):
        print(event.delta, end="", flush=True)
    print()

    asked = [question(image, f"is there a {color} ring?") for color in ("blue", "red")]
    batch = (pb.BatchRequest(index=index, question=each) for index, each in enumerate(asked))
    for result in glimpse.Batch(batch):
        print(result.index, result.error.message if result.HasField("error") else result.answer.answer)
