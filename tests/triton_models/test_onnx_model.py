"""Test the generic ONNX runner and the Q-Former's group runner as Triton calls them."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from triton_python_backend_utils import InferenceRequest, start_arguments

from service.core.card import ModelCard
from service.core.errors import InvalidRequest
from service.core.tensors import DTYPES, MODELS
from tests.triton_models.conftest import TRACED, Recorded
from triton_models import onnx_model, qformer
from triton_models.parameters import Parameters
from triton_models.query_groups import GroupRunner

REPOSITORY = Path(__file__).parents[2] / "model_repository"
CARD = ModelCard.from_json((REPOSITORY / "card.json").read_text())
QUERIES, HIDDEN, WIDTH = 32, 4, 4


def save(folder: Path, nodes, inputs, outputs, initializers=()) -> Path:
    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(nodes, "g", [value(*i) for i in inputs], [value(*o) for o in outputs], list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "1").mkdir(exist_ok=True)
    onnx.save(model, folder / "1" / "model.onnx")
    return folder / "1" / "model.onnx"


@pytest.fixture
def adder(tmp_path):
    """a [B, 3] + b [B, 3] -> total; a > 0 -> positive."""
    save(
        tmp_path,
        [helper.make_node("Add", ["a", "b"], ["total"]), helper.make_node("Greater", ["a", "b"], ["larger"])],
        [("a", TensorProto.FLOAT, ["batch", 3]), ("b", TensorProto.FLOAT, ["batch", 3])],
        [("total", TensorProto.FLOAT, ["batch", 3]), ("larger", TensorProto.BOOL, ["batch", 3])],
    )
    model = onnx_model.TritonPythonModel()
    model.initialize(start_arguments(tmp_path, inputs=["a", "b"], outputs=["total", "larger"]))
    return model


def request(a, b, outputs=("total", "larger"), **parameters) -> InferenceRequest:
    return InferenceRequest({"a": np.array(a, np.float32), "b": np.array(b, np.float32)}, list(outputs), **parameters)


def test_a_batch_of_requests_is_answered_request_by_request(adder):
    one = request([[1, 2, 3]], [[1, 1, 1]])
    two = request([[4, 5, 6], [7, 8, 9]], [[1, 1, 1], [2, 2, 2]])
    first, second = adder.execute([one, two])
    assert first.outputs["total"].tolist() == [[2, 3, 4]]
    assert second.outputs["total"].tolist() == [[5, 6, 7], [9, 10, 11]]
    assert first.outputs["larger"].tolist() == [[False, True, True]]


def test_a_nice_model_leaves_the_cores_to_others(adder, tmp_path):
    found = []

    def start() -> None:
        own = threading.get_native_id()  # on Linux each thread has its own niceness
        before = os.getpriority(os.PRIO_PROCESS, own)
        model = onnx_model.TritonPythonModel()
        names = {"inputs": ["a", "b"], "outputs": ["total", "larger"]}
        model.initialize(start_arguments(tmp_path, **names, parameters={"nice": "3"}))
        found.append(os.getpriority(os.PRIO_PROCESS, own) - before)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert found == [3]


def test_only_the_outputs_asked_for_are_sent(adder):
    (response,) = adder.execute([request([[1, 2, 3]], [[1, 1, 1]], ["total"])])
    assert set(response.outputs) == {"total"}


def test_a_faulty_request_fails_alone(adder):
    good, faulty = request([[1, 2, 3]], [[1, 1, 1]]), request([[1, 2]], [[1, 1]])
    answered = adder.execute([good, faulty, good])
    assert [response.error is None for response in answered] == [True, False, True]
    assert answered[0].outputs["total"].tolist() == [[2, 3, 4]]
    assert "dimensions" in answered[1].error.message()


def test_the_span_of_a_faulty_request_fails_alone(adder, recorded: Recorded):
    good, faulty = request([[1, 2, 3]], [[1, 1, 1]], **TRACED), request([[1, 2]], [[1, 1]], **TRACED)
    adder.execute([request([[1, 2, 3]], [[1, 1, 1]]), good, faulty, good])
    told = [(span.status.is_ok, span.attributes.get("error.type")) for span in recorded.ended()]
    assert told == [(True, None), (False, "model"), (True, None)]
    assert {span.attributes["glimpse.batch"] for span in recorded.ended()} == {4}


def test_a_parent_that_is_no_text_starts_no_span_and_fails_nobody(adder, recorded: Recorded):
    asked = [request([[1, 2, 3]], [[1, 1, 1]], **parameters) for parameters in ({"traceparent": 7}, TRACED)]
    assert [response.error for response in adder.execute(asked)] == [None, None]
    assert len(recorded.ended()) == 1


def test_a_model_sends_its_last_spans_when_it_is_unloaded(adder, recorded: Recorded):
    adder.execute([request([[1, 2, 3]], [[1, 1, 1]], **TRACED)])
    adder.finalize()
    assert recorded.ended_before_close == 1


def test_the_q_former_sends_its_last_spans_too(recorded: Recorded):
    model = qformer.TritonPythonModel()
    model.initialize(start_arguments(REPOSITORY / "qformer", inputs=[], outputs=[]))
    (response,) = model.execute([InferenceRequest({"vision_mask": np.ones((1, 2), np.int32)}, [], **TRACED)])
    assert response.has_error()
    model.finalize()
    assert [span.status.is_ok for span in recorded.ended()] == [False]
    assert recorded.ended_before_close == 1


def test_a_graph_that_does_not_fit_the_configuration_fails_the_load(adder, tmp_path):
    model = onnx_model.TritonPythonModel()
    with pytest.raises(ValueError, match=r"\['a', 'c'\].*the graph has \['a', 'b'\]"):
        model.initialize(start_arguments(tmp_path, inputs=["a", "c"], outputs=["total"]))


@pytest.mark.parametrize(("provider", "told"), [("cuda", "CUDAExecutionProvider"), ("openvino", "choose cpu or cuda")])
def test_a_provider_that_is_not_there_fails_the_load(adder, tmp_path, provider, told):
    """ONNX Runtime itself would silently compute on the CPU."""
    parameters = {"provider": provider}
    arguments = start_arguments(tmp_path, inputs=["a", "b"], outputs=["total"], parameters=parameters)
    with pytest.raises(ValueError, match=told):
        onnx_model.TritonPythonModel().initialize(arguments)


def test_zero_threads_are_every_core(adder, tmp_path):
    model = onnx_model.TritonPythonModel()
    model.initialize(
        start_arguments(tmp_path, inputs=["a", "b"], outputs=["total"], parameters={"intra_op_threads": "0"})
    )
    (response,) = model.execute([request([[1, 2, 3]], [[1, 1, 1]], ["total"])])
    assert response.outputs["total"].tolist() == [[2, 3, 4]]


def test_instances_share_the_cores(tmp_path):
    arguments = start_arguments(tmp_path, inputs=[], outputs=[], parameters={"intra_op_threads": "0"})
    cores = Parameters(arguments).intra_op_threads
    assert cores == len(os.sched_getaffinity(0))
    told = json.loads(arguments["model_config"]) | {"instance_group": [{"count": cores}, {"count": 1}]}
    assert Parameters(arguments | {"model_config": json.dumps(told)}).intra_op_threads == 1


def test_a_negative_parameter_fails_the_load(adder, tmp_path):
    model = onnx_model.TritonPythonModel()
    arguments = start_arguments(tmp_path, inputs=["a", "b"], outputs=["total"], parameters={"intra_op_threads": "-1"})
    with pytest.raises(ValueError, match="intra_op_threads"):
        model.initialize(arguments)


def clip(frames: int, times: int) -> InferenceRequest:
    sizes = {"D": CARD.vision_width, "H": CARD.hidden_size}
    tensors = {each.name: each.sized(CARD.float_type, sizes) for each in MODELS["attend_clip"].inputs}
    arrays = {
        name: np.zeros([frames if size == -1 else size for size in each.dims], DTYPES[each.datatype])
        for name, each in tensors.items()
    }
    arrays["times"] = np.linspace(0, 1, times, dtype=np.float32)
    arrays["clip_budget"] = np.array([64, 64], np.int32)
    return InferenceRequest(arrays, ["visual_tokens"])


def test_a_clip_of_more_frames_than_the_card_says_is_not_run():
    """A thousand frames would take gigabytes."""
    model = onnx_model.TritonPythonModel()
    names = [tensor.name for tensor in MODELS["attend_clip"].inputs]
    model.initialize(start_arguments(REPOSITORY / "attend_clip", inputs=names, outputs=["visual_tokens"]))
    most = CARD.most_frames
    for frames, times in ((most + 1, most + 1), (most, most + 1), (most + 1, most)):
        (response,) = model.execute([clip(frames, times)])
        assert response.error.code == "INVALID_ARG"
        assert f"the clip has {most + 1} frames: send at most {most}" in response.error.message()
    (response,) = model.execute([clip(2, 2)])
    assert response.error is None
    model.finalize()


@pytest.fixture
def runner(tmp_path):
    """Make a Q-Former whose 32 visual tokens all equal the sum of the vision tokens that it reads."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [3], [1, QUERIES, 1])
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [2])
    rows = helper.make_tensor("rows", TensorProto.INT64, [1], [1])
    graph = save(
        tmp_path,
        [
            helper.make_node("Cast", ["attend"], ["seen"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["seen", "axes"], ["column"]),
            helper.make_node("Mul", ["vision_tokens", "column"], ["visible"]),
            helper.make_node("ReduceSum", ["visible", "rows"], ["sum"], keepdims=1),
            helper.make_node("Tile", ["sum", "shape"], ["visual_tokens"]),
        ],
        [
            ("vision_tokens", TensorProto.FLOAT, ["batch", "tokens", WIDTH]),
            ("attend", TensorProto.INT32, ["batch", "tokens"]),
        ],
        [("visual_tokens", TensorProto.FLOAT, ["batch", QUERIES, HIDDEN])],
        [shape, axes, rows],
    )
    return GroupRunner(graph)


def vision(*masks: list[int], groups: list[int]) -> dict[str, np.ndarray]:
    """Make inputs whose token i is [2**i] * D, so that a sum tells which tokens were read."""
    tokens = np.zeros((len(masks), 401, WIDTH), np.float32)
    mask = np.zeros((len(masks), 401), np.int32)
    for row, image in enumerate(masks):
        mask[row, : len(image)] = image
        tokens[row, : len(image)] = 2.0 ** np.arange(len(image))[:, np.newaxis]
    tokens[mask == 0] = 1e6  # padding must never be read
    return {"vision_tokens": tokens, "vision_mask": mask, "query_groups": np.array(groups, np.int32)[:, np.newaxis]}


def test_the_first_group_sees_all_and_focus_groups_only_their_own(runner):
    found = runner.run(vision([1, 1, 2, 3, 2], [1, 1, 1], [1, 2], groups=[3, 1, 2]))
    assert found["visual_count"].tolist() == [[96], [32], [64]]
    sums = found["visual_tokens"][:, ::QUERIES, 0]
    assert sums.tolist() == [[31, 20, 8, 0], [7, 0, 0, 0], [3, 2, 0, 0]]
    assert found["visual_tokens"].shape == (3, 128, HIDDEN)
    assert found["visual_tokens"].flags.c_contiguous


def test_a_focus_group_without_tokens_is_refused(runner):
    with pytest.raises(InvalidRequest, match="without a vision token"):
        runner.run(vision([1, 1, 3], groups=[2]))


def test_a_mask_of_another_length_is_refused(runner):
    inputs = vision([1, 1, 2], groups=[2])
    with pytest.raises(InvalidRequest, match="vision_mask has 257 entries"):
        runner.run(inputs | {"vision_mask": inputs["vision_mask"][:, :257]})


@pytest.mark.parametrize("groups", [0, 5])
def test_the_number_of_groups_is_bounded(runner, groups):
    with pytest.raises(InvalidRequest, match="1 to 4"):
        runner.run(vision([1, 1], groups=[groups]))
