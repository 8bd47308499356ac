"""The tensor contract, compared where it is written down: config.pbtxt, the ONNX graphs and service.triton."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from build_engines.repository import Dimensions, config, models, runner, write_configs
from build_engines.verify.files import fits
from service.core.card import Engines, ModelCard
from service.core.tensors import FLOAT, VISION, Tensor
from service.core.vision import VisionFeatures
from service.triton import CALLED, read_engines

Spec = tuple[str, tuple[int, ...], bool]  # data type, shape without the batch dimension, optional


def parse(repository: Path, model: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def specs(tensors: object) -> dict[str, Spec]:
    """Inputs or outputs of a ModelConfig."""
    return {
        tensor.name: (
            model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_"),
            tuple(tensor.dims),
            getattr(tensor, "optional", False),
        )
        for tensor in tensors  # type: ignore[attr-defined]
    }


def graph_specs(values: object) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Inputs or outputs of an ONNX graph, their first dimension left out; a named dimension is -1."""
    named = {
        np.dtype(np.float16): "FP16",
        np.dtype(np.float32): "FP32",
        np.dtype(np.int32): "INT32",
        np.dtype(np.uint8): "UINT8",
    }
    found = {}
    for value in values:  # type: ignore[attr-defined]
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
        assert dims[0] == -1, f"{value.name}: the batch must be dynamic"
        found[value.name] = (named.get(dtype, str(dtype).upper()), tuple(dims[1:]))
    return found


@pytest.fixture(scope="module", params=sorted(CALLED))
def called(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, card: ModelCard) -> Path:
    """The configurations of the committed checkpoint, which has all that a checkpoint can have."""
    folder = tmp_path_factory.mktemp("written")
    write_configs(folder, dimensions(card))
    return folder


def dimensions(card: ModelCard) -> Dimensions:
    return Dimensions(
        card.vision_width,
        card.hidden_size,
        closer_view=card.closer_view,
        clip=card.clip is not None,
        clip_weights=card.clip_weights,
    )


def test_every_model_of_the_repository_is_known(repository: Path, card: ModelCard) -> None:
    on_disk = {path.parent.name for path in repository.glob("*/config.pbtxt")}
    assert on_disk == {model.name for model in models(dimensions(card))}
    assert on_disk >= {*card.called, "vision_encoder", "vqa", *CALLED}


def test_committed_configurations_are_what_the_writer_writes(repository: Path, card: ModelCard) -> None:
    for model in models(dimensions(card)):
        assert (repository / model.name / "config.pbtxt").read_text() == config(model)
        if not model.steps:
            assert (repository / model.name / "1" / "model.py").read_text() == runner(model)


def test_client_and_configuration_name_the_same_tensors(written: Path, card: ModelCard, called: str) -> None:
    """Every required input is sent, nothing unknown is sent, and what is read exists, with the same type and shape."""
    parsed, model = parse(written, called), CALLED[called]
    sent = {t.name: (t.datatype, t.dims, t.optional) for t in map(card.sized, model.inputs)}
    read = {t.name: (t.datatype, t.dims, False) for t in map(card.sized, model.outputs)}
    accepted, given = specs(parsed.input), specs(parsed.output)
    assert {name: accepted.get(name) for name in sent} == sent
    assert {name: given.get(name) for name in read} == read
    assert {name for name, (_, _, optional) in accepted.items() if not optional} <= sent.keys()
    assert parsed.model_transaction_policy.decoupled == (model.decoupled and not parsed.ensemble_scheduling.step)
    assert (parsed.max_batch_size > 0) == model.batched


def test_client_knows_what_each_path_goes_through(written: Path, called: str) -> None:
    """What `abandon` reaches when a model's process dies."""
    steps = [step.model_name for step in parse(written, called).ensemble_scheduling.step]
    assert list(CALLED[called].through) == (steps or [called])


@pytest.mark.parametrize("name", ["vision_encoder", "relevance_allocator", "relevance_allocator_448"])
def test_graph_and_configuration_agree(repository: Path, card: ModelCard, name: str) -> None:
    if name == "relevance_allocator_448" and not card.closer_view:
        pytest.skip(f"{card.name} has no closer view")
    graph = onnx.load(repository / name / "1" / "model.onnx", load_external_data=False).graph
    parsed = parse(repository, name)
    assert graph_specs(graph.input) == {key: spec[:2] for key, spec in specs(parsed.input).items()}
    assert graph_specs(graph.output) == {key: spec[:2] for key, spec in specs(parsed.output).items()}


def test_qformer_graph_has_the_configured_widths(repository: Path, card: ModelCard) -> None:
    """The runner trims padding and runs the queries group by group, so the graph's own shapes differ."""
    graph = onnx.load(repository / "qformer" / "1" / "model.onnx", load_external_data=False).graph
    inputs, outputs = graph_specs(graph.input), graph_specs(graph.output)
    assert inputs["vision_tokens"] == ("FP32", (-1, card.vision_width))
    assert inputs["attend"] == ("INT32", (-1,))
    assert inputs.keys() - {"vision_tokens", "attend"} <= {"question_ids", "question_mask"}
    assert outputs == {"visual_tokens": ("FP32", (32, card.hidden_size))}


def test_llm_graph_has_the_configured_widths(repository: Path, card: ModelCard) -> None:
    graph = onnx.load(repository / "llm" / "1" / "model.onnx", load_external_data=False).graph
    inputs, outputs = graph_specs(graph.input), graph_specs(graph.output)
    assert inputs["prompt_embedding_table"] == ("FP32", (-1, card.hidden_size))
    assert outputs["logits"] == ("FP32", (card.vocab_size,))
    past = {name.removeprefix("past_"): spec for name, spec in inputs.items() if name.startswith(("past_k", "past_v"))}
    new = {name.removeprefix("new_"): spec for name, spec in outputs.items() if name != "logits"}
    layers = len(past) // 2
    assert list(past) == [f"{part}_{layer}" for layer in range(layers) for part in ("key", "value")]
    assert list(past.items()) == list(new.items())
    ((_, (heads, columns, head_dim)),) = set(past.values())
    assert columns == -1
    assert min(layers, heads, head_dim) > 0


def test_ensemble_steps_hand_on_what_the_models_take(written: Path) -> None:
    """Each mapped tensor exists in its model, and one ensemble tensor has one type and shape wherever it goes."""
    for model in models(Dimensions(1, 1, closer_view=True)):
        parsed = parse(written, model.name)
        flowing = {name: spec[:2] for name, spec in specs(parsed.input).items()}
        for step in parsed.ensemble_scheduling.step:
            inner = parse(written, step.model_name)
            inputs, outputs = specs(inner.input), specs(inner.output)
            assert {name for name, spec in inputs.items() if not spec[2]} <= step.input_map.keys()
            for key, value in step.input_map.items():
                assert fits(flowing[value], inputs[key][:2]), f"{model.name}: {value} into {step.model_name}"
            flowing |= {value: outputs[key][:2] for key, value in step.output_map.items()}
        if parsed.ensemble_scheduling.step:
            for name, spec in specs(parsed.output).items():
                assert flowing[name] == spec[:2]


def test_the_encoders_outputs_are_the_fields_of_what_is_kept() -> None:
    """The client makes VisionFeatures of them by position."""
    assert [tensor.name for tensor in VISION] == [field.name for field in dataclasses.fields(VisionFeatures)]


def test_a_tensor_takes_the_type_and_the_sizes_of_a_checkpoint() -> None:
    tensor = Tensor("features", FLOAT, (257, "D"), "CLS first")
    assert tensor.sized("FP16", {"D": 48}) == Tensor("features", "FP16", (257, 48), "CLS first")
    assert Tensor("mask", "INT32", (-1,)).sized("FP16", {}) == Tensor("mask", "INT32", (-1,))
    with pytest.raises(KeyError, match="D"):
        tensor.sized("FP16", {"H": 64})


def test_large_graphs_run_on_every_core() -> None:
    told = {model.name: config(model) for model in models(Dimensions(1, 1, large=frozenset({"vision_encoder"})))}
    every, one = (f'key: "intra_op_threads", value: {{ string_value: "{cores}" }}' for cores in (0, 1))
    assert every in told["vision_encoder"]
    assert "count: 2" in told["vision_encoder"]
    assert one in told["llm"]


def test_weights_fit_the_repository(repository: Path) -> None:
    assert sum(graph.stat().st_size for graph in repository.glob("*/1/model.onnx")) <= 30e6


def test_what_may_run_at_once_is_read_from_the_configurations(repository: Path, tmp_path: Path) -> None:
    assert read_engines(repository) == Engines(encoder_images=1, llm_rows=32)
    batched = "max_batch_size: 8 dynamic_batching { } instance_group [ { count: 2, kind: KIND_GPU } ]"
    for model, text in {"vision_encoder": batched, "llm": "max_batch_size: 64"}.items():
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.pbtxt").write_text(text)
    assert read_engines(tmp_path) == Engines(encoder_images=16, llm_rows=64)
    (tmp_path / "llm" / "config.pbtxt").write_text("max_batch_size: many")
    with pytest.raises(ValueError, match=r"config\.pbtxt"):
        read_engines(tmp_path)


def test_only_an_llm_with_weights_for_clips_has_their_input() -> None:
    for clip_weights in (False, True):
        (llm,) = (model for model in models(Dimensions(1, 1, clip_weights=clip_weights)) if model.name == "llm")
        assert ("clip_weights" in {tensor.name for tensor in llm.inputs}) == clip_weights
