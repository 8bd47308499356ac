"""Configurations of the GPU profiles, parsed by Triton's protocol and checked against the gateway's contract."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from build_engines.convert.options import Options, checked
from build_engines.convert.precision import not_fp8, to_fp16
from build_engines.convert.profiles import configuration, dimensions, inputs_of, served
from build_engines.convert.source import Source
from build_engines.repository import GRAPHS, Dimensions, models
from service.core.card import ModelCard
from service.core.prompt import Prompt
from service.core.tensors import CLIP_WEIGHTS, FLOAT, LIKELIEST, TEXT
from service.triton import CALLED, read_engines
from tests.service.core.test_tensors import graph_specs, specs
from triton_models.decoder import OnnxDecoder

FLOATS = {"features", "texture", "detail_features", "vision_tokens", "visual_tokens", "prompt_embedding_table"}
PROFILES = [("onnx-gpu", "fp32"), ("onnx-gpu", "fp16"), ("tensorrt", "fp16"), ("tensorrt", "fp8")]


def source(card: ModelCard, closer_view: bool = True) -> Source:
    return Source(
        directory=Path("reference"),
        name=card.name,
        family="Blip2ForConditionalGeneration",
        language="opt",
        vision_width=card.vision_width,
        hidden_size=card.hidden_size,
        vocab_size=card.vocab_size,
        max_positions=card.max_positions,
        parameters={"vision_encoder": 1, "qformer": 1, "llm": 1},
        closer_view=closer_view,
        clip=True,
        clip_weights=True,
    )


def options(profile: str, precision: str) -> Options:
    return checked(Options("reference", Path("engines"), profile, precision))


def parsed(asked: Options, card: ModelCard) -> dict[str, model_config_pb2.ModelConfig]:
    """Configurations of every model that the profile serves."""
    return {
        model.name: text_format.Parse(configuration(asked, source(card), model), model_config_pb2.ModelConfig())
        for model in served(asked, source(card))
    }


def test_only_the_cpus_profile_attends_to_whole_clips(card: ModelCard) -> None:
    for profile, precision in (*PROFILES, ("embedded", "fp32")):
        names = {model.name for model in served(options(profile, precision), source(card))}
        assert ("attend_clip" in names) == (profile == "embedded")


@pytest.mark.parametrize(("profile", "precision"), PROFILES)
def test_the_gateways_tensors_are_those_of_the_configurations(card: ModelCard, profile: str, precision: str) -> None:
    """Every required input is sent, no unknown one is sent, and every read output exists with its type and shape."""
    asked = options(profile, precision)
    configs, widths = parsed(asked, card), {"D": card.vision_width, "H": card.hidden_size}

    def told(tensor) -> tuple[str, tuple[int, ...], bool]:
        if tensor.datatype == TEXT:  # a string for TensorRT-LLM's backend; the Python backend has none
            return ("STRING", (1,), True) if profile == "tensorrt" else ("UINT8", (-1,), True)
        assert (tensor.datatype == FLOAT) == (tensor.name in FLOATS)
        datatype = asked.dtype if tensor.name in FLOATS else tensor.datatype
        return datatype, tuple(widths.get(dim, dim) for dim in tensor.dims), getattr(tensor, "optional", False)

    for name, model in CALLED.items():
        if name not in configs:
            assert name == "attend_clip" or (name, profile) == ("vqa", "tensorrt")  # GPUs look frame by frame
            continue
        accepted, given = specs(configs[name].input), specs(configs[name].output)
        # The card says so: top_logprobs is refused, and the LLM has one set of weights.
        without = {CLIP_WEIGHTS, *(LIKELIEST if profile == "tensorrt" else ())}
        sent, read = (
            {t.name: told(t) for t in tensors if t.name not in without} for tensors in (model.inputs, model.outputs)
        )
        assert accepted.keys().isdisjoint(without)
        assert {key: accepted.get(key) for key in sent} == sent
        assert {key: given.get(key) for key in read} == read
        assert {key for key, spec in accepted.items() if not spec[2]} <= sent.keys()
        assert {step.model_name for step in configs[name].ensemble_scheduling.step} <= configs.keys()


@pytest.mark.parametrize(("profile", "precision"), PROFILES)
def test_an_ensembles_steps_hand_on_what_the_models_take(card: ModelCard, profile: str, precision: str) -> None:
    configs = parsed(options(profile, precision), card)
    for config in configs.values():
        flowing = {name: spec[:2] for name, spec in specs(config.input).items()}
        for step in config.ensemble_scheduling.step:
            inner = configs[step.model_name]
            inputs, outputs = specs(inner.input), specs(inner.output)
            assert {name for name, spec in inputs.items() if not spec[2]} <= step.input_map.keys()
            for key, value in step.input_map.items():
                assert flowing[value] == inputs[key][:2], f"{config.name}: {value} into {step.model_name}"
            flowing |= {value: outputs[key][:2] for key, value in step.output_map.items()}


def test_a_large_encoder_takes_every_core_of_a_machine_without_a_gpu(card: ModelCard) -> None:
    large = replace(source(card), parameters={"vision_encoder": 985_953_792, "qformer": 1000, "llm": 1000})
    assert dimensions(options("embedded", "fp32"), large).large == {"vision_encoder"}
    assert dimensions(options("onnx-gpu", "fp16"), large).large == frozenset()


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_plans_batch_are_warm_and_have_a_graph_a_size(card: ModelCard, precision: str) -> None:
    asked = options("tensorrt", precision)
    configs = parsed(asked, card)
    for name in ("vision_encoder", "relevance_allocator", "qformer"):
        config, dims = configs[name], inputs_of(asked, source(card), name)
        assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
        assert config.max_batch_size == asked.vision_batch
        assert [(group.count, group.kind, list(group.gpus)) for group in config.instance_group] == [
            (1, model_config_pb2.ModelInstanceGroup.KIND_GPU, [0])  # without the list: one on every visible GPU
        ]
        assert list(config.dynamic_batching.preferred_batch_size) == [asked.opt_batch]
        assert config.dynamic_batching.default_queue_policy.max_queue_size > 0
        assert not config.response_cache.enable
        cuda = config.optimization.cuda
        assert cuda.graphs
        assert [spec.batch_size for spec in cuda.graph_spec] == [1, 2, 4, 8]
        for spec in cuda.graph_spec:
            assert {key: tuple(shape.dim) for key, shape in spec.input.items()} == dims
        for warm in config.model_warmup:
            assert {key: tuple(each.dims) for key, each in warm.inputs.items()} == dims
        assert not any(-1 in tensor.dims for tensor in (*config.input, *config.output))
        types = {spec[0] for spec in (specs(config.input) | specs(config.output)).values()}
        assert types <= {"FP16", "FP32", "INT32", "UINT8"}


def test_tensorrt_llm_gets_its_own_names_shapes_and_parameters(card: ModelCard) -> None:
    """Names, types and shapes as in TensorRT-LLM 1.2.1's triton_backend/all_models/inflight_batcher_llm."""
    config = parsed(options("tensorrt", "fp16"), card)["llm"]
    assert config.backend == "tensorrtllm"
    assert config.model_transaction_policy.decoupled
    inputs = {tensor.name: tensor for tensor in config.input}
    for name in ("input_lengths", "request_output_len", "end_id", "pad_id", "temperature", "seed", "streaming", "stop"):
        assert list(inputs[name].dims) == [1]
        assert inputs[name].HasField("reshape")
        assert list(inputs[name].reshape.shape) == []
    for name in ("input_ids", "prompt_embedding_table", "prompt_table_extra_ids"):
        assert inputs[name].allow_ragged_batch
        assert not inputs[name].HasField("reshape")
    for name in ("guided_decoding_guide_type", "guided_decoding_guide"):
        assert (list(inputs[name].dims), inputs[name].data_type) == ([1], model_config_pb2.TYPE_STRING)
        assert inputs[name].allow_ragged_batch
        assert not inputs[name].HasField("reshape")
    assert inputs["prompt_table_extra_ids"].data_type == model_config_pb2.TYPE_UINT64
    assert inputs["prompt_embedding_table"].data_type == model_config_pb2.TYPE_FP16
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert parameters["gpt_model_type"] == "inflight_fused_batching"
    assert parameters["gpt_model_path"] == "/models/llm/1"
    assert parameters["exclude_input_in_output"] == "true"  # else the answer would start with the prompt
    assert parameters["enable_kv_cache_reuse"] == "true"
    # The backend reads these three without a default.
    assert {"tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path"} <= parameters.keys()


def test_the_gateway_reads_from_them_what_may_run_at_once(card: ModelCard, tmp_path: Path) -> None:
    asked = options("tensorrt", "fp16")
    for model in served(asked, source(card)):
        (tmp_path / model.name).mkdir()
        (tmp_path / model.name / "config.pbtxt").write_text(configuration(asked, source(card), model))
    engines = read_engines(tmp_path)
    assert (engines.encoder_images, engines.llm_rows) == (asked.vision_batch, asked.llm.max_batch)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_in_fp16_has_the_types_of_its_configuration_and_answers_alike(
    repository: Path, card: ModelCard, tmp_path: Path, name: str
) -> None:
    path = repository / name / "1" / "model.onnx"
    converted = to_fp16(name, onnx.load(path))
    onnx.checker.check_model(converted.model, full_check=True)
    assert converted.kept
    if name in ("vision_encoder", "relevance_allocator"):
        (model,) = (m for m in models(Dimensions(card.vision_width, card.hidden_size, "FP16")) if m.name == name)
        graph = converted.model.graph
        for values, tensors in ((graph.input, model.inputs), (graph.output, model.outputs)):
            assert graph_specs(values) == {tensor.name: (tensor.datatype, tensor.dims) for tensor in tensors}
    types = {value.name: value.type.tensor_type.elem_type for value in converted.model.graph.value_info}
    ops = {node.op_type: node for node in converted.model.graph.node}
    for node in converted.model.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT
    if name != "relevance_allocator":
        products = [types.get(n.output[0]) for n in converted.model.graph.node if n.op_type == "MatMul"]
        assert products.count(onnx.TensorProto.FLOAT16) > 10
    assert "Cast" in ops
    onnx.save(converted.model, tmp_path / "model.onnx")
    ours, theirs = (
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for file in (tmp_path / "model.onnx", path)
    )
    feeds = {spec.name: feed(spec, card) for spec in theirs.get_inputs()}
    halves = {
        s.name: feeds[s.name].astype(np.float16) if s.type == "tensor(float16)" else feeds[s.name]
        for s in ours.get_inputs()
    }
    names = [spec.name for spec in theirs.get_outputs()]
    for output, half, full in zip(names, ours.run(names, halves), theirs.run(names, feeds), strict=True):
        assert np.isfinite(half).all()
        assert cosine(half, full) > 0.999, output


def test_what_fp8_leaves_alone_in_an_encoder(repository: Path) -> None:
    encoder, qformer = (onnx.load(repository / name / "1" / "model.onnx") for name in ("vision_encoder", "qformer"))
    spared = not_fp8(encoder)
    assert Counter(why.split(":")[0] for why in spared.values()) == {
        "texture and entropy": 2, "attention": 11, "the first and the last layer": 8, "queries, keys and values": 3,
    }  # fmt: skip
    products = [node.name for node in encoder.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(set(products) - spared.keys()) == 9  # of the three layers between: projection, up and down
    with pytest.raises(ValueError, match="layer 0 of the vision encoder multiplies by"):
        not_fp8(qformer)


def test_the_runner_decodes_in_fp16_what_it_decodes_in_fp32(repository: Path, card: ModelCard, tmp_path: Path) -> None:
    path = repository / "llm" / "1" / "model.onnx"
    onnx.save(to_fp16("llm", onnx.load(path)).model, tmp_path / "model.onnx")
    table = np.random.default_rng(5).standard_normal((32, card.hidden_size)).astype(np.float32)
    ids = np.concatenate([np.arange(card.vocab_size, card.vocab_size + 32), [card.bos_id, 40, 41, 42]]).astype(np.int32)
    prompts = [
        Prompt(ids, table, (ids >= card.vocab_size).astype(np.uint64)),
        Prompt(ids[:-1], table, (ids[:-1] >= card.vocab_size).astype(np.uint64)),
    ]
    halves, full = (OnnxDecoder(file, max_rows=2) for file in (tmp_path / "model.onnx", path))
    ours, theirs = (each.prefill(prompts, [each.recall(prompt) for prompt in prompts]) for each in (halves, full))
    for _ in range(70):  # beyond a block of the pool
        assert cosine(ours, theirs) > 0.999
        tokens = theirs.argmax(1).astype(np.int64)
        ours, theirs = halves.step(tokens), full.step(tokens)
    assert ours.dtype == np.float32


def feed(spec: onnxruntime.NodeArg, card: ModelCard) -> np.ndarray:
    """Plausible values of the input's type. A varying batch is 2 and a varying length 5."""
    varying = {"batch": 2}
    shape = [varying.get(size, 5) if isinstance(size, str) else size for size in spec.shape]
    generator = np.random.default_rng(len(spec.name))
    if spec.name in ("past_lengths", "input_lengths"):
        return np.array([5, 3])
    if spec.name == "budget":
        return np.array([[64, 160, 32, 32]] * 2, np.int32)
    if spec.type == "tensor(float)":
        return generator.uniform(0, 1, shape).astype(np.float32)
    if spec.type == "tensor(uint8)":
        return generator.integers(0, 256, shape, np.uint8)
    if spec.name in ("attend", "question_mask"):
        return np.ones(shape, np.int32)
    return generator.integers(5, 400, shape).astype(np.int32 if spec.type == "tensor(int32)" else np.int64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths else float(np.array_equal(a, b))
