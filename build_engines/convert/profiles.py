"""Triton's models of each profile, and their configurations. Pure.

`onnx-gpu` is the CPU's repository with the CUDA provider. Its vision models pass tensors on in GPU memory. Its Q-Former
is therefore the static graph of the plans, which no runner has to index on the host.

`tensorrt` has plans behind the same names and tensors, the ensembles that the gateway calls, and TensorRT-LLM's own
backend for the LLM. It has no `vqa` ensemble: its Python steps need this project inside the server, and NVIDIA's stock
images do not contain it.
"""

from __future__ import annotations

from dataclasses import replace

from build_engines.convert.options import Options
from build_engines.convert.source import Source
from build_engines.convert.trtllm import longest
from build_engines.repository import (
    LARGE_BYTES,
    Dimensions,
    Model,
    Parameter,
    config,
    graphs_of,
    models,
    tensor_lines,
)
from service.core.tensors import Tensor

ENSEMBLES = ("see", "attend", "attend_448")
MOST_QUEUED = 64  # requests waiting for a plan; further ones are refused
QUEUE_DELAY_US = 500  # a batch waits this long for another image: a hundredth of an encode's time
PROVIDER = Parameter("provider", "cuda", "where ONNX Runtime computes")
BOUND = (
    Parameter("io_binding", "yes", "tensors stay on the GPU from model to model"),
    Parameter("FORCE_CPU_ONLY_INPUT_TENSORS", "no", "and Triton leaves them there"),
)
# One GPU only: with an LLM on each GPU, a request's stop could reach any of them, and tensors would cross GPUs.
ON_GPU = "kind: KIND_GPU, gpus: [ 0 ]"
UNSET = "${%s}"  # the backend treats this as not set, but requires the parameter


def dimensions(options: Options, source: Source) -> Dimensions:
    large = {name for name, count in source.parameters.items() if 4 * count > LARGE_BYTES}
    return Dimensions(
        vision_width=source.vision_width,
        hidden_size=source.hidden_size,
        float_type=options.dtype,
        text_type=text_type(options),
        top_log_probs=options.profile != "tensorrt",
        vision_max_batch=options.vision_batch,
        large=frozenset(large if options.profile == "embedded" else ()),
        closer_view=source.closer_view,
        text_encoder=source.is_encoder_decoder,
        image_reader=source.is_idefics,
        clip=source.clip and options.profile == "embedded",
        clip_weights=source.clip_weights and options.profile == "embedded",
        static=options.profile != "embedded",
    )


def served(options: Options, source: Source) -> list[Model]:
    """The models of the repository, in the order of a request's life."""
    found = models(dimensions(options, source))
    if options.profile == "onnx-gpu":
        graphs = graphs_of(dimensions(options, source))
        return [on_gpu(m) if m.name in graphs else m for m in found]
    if options.profile == "tensorrt":
        return [m for m in found if m.name in {*graphs_of(dimensions(options, source)), *ENSEMBLES}]
    return found


def text_type(options: Options) -> str:
    """Triton's type of texts for the LLM."""
    return "BYTES" if options.profile == "tensorrt" else "UINT8"


def guides(options: Options) -> bool:
    """Whether the LLM can constrain answers. TensorRT-LLM's backend could, but its configuration leaves that unset."""
    return options.profile != "tensorrt"


def on_gpu(model: Model) -> Model:
    """Run a model of the CPU's repository with the CUDA provider.

    The LLM's keys and values stay in the host's memory.
    """
    if model.name == "llm":
        return replace(model, parameters=(PROVIDER, *model.parameters))
    return replace(model, runner="onnx_model", parameters=(PROVIDER, *BOUND, *model.parameters))


def inputs_of(options: Options, source: Source, name: str) -> dict[str, tuple[int, ...]]:
    """The inputs of one model by name, without the batch dimension."""
    (model,) = (m for m in served(options, source) if m.name == name)
    return {tensor.name: tensor.dims for tensor in model.inputs}


def configuration(options: Options, source: Source, model: Model) -> str:
    """The text of one model's `config.pbtxt`."""
    if options.profile == "onnx-gpu" and PROVIDER in model.parameters:
        return config(model).replace("kind: KIND_CPU", ON_GPU)
    if options.profile == "tensorrt" and not model.steps:
        return llm_config(options, source, model) if model.name == "llm" else plan_config(options, model)
    return config(model)


def plan_config(options: Options, model: Model) -> str:
    """Configuration of one plan in Triton's `tensorrt` backend.

    A batch waits at most QUEUE_DELAY_US for more images. Each common batch size has a CUDA graph, recorded at warm-up,
    so that no request pays for it. Triton caches no responses: the gateway caches features itself, for a configured
    time.
    """
    sizes = sorted({1, 2, options.opt_batch, options.vision_batch} & set(range(1, options.vision_batch + 1)))
    inputs = "\n".join(f'          input {{ key: "{t.name}", value {{ dim: [ {_dims(t)} ] }} }}' for t in model.inputs)
    specs = ",\n".join(f"        {{\n          batch_size: {size}\n{inputs}\n        }}" for size in sizes)
    warm = "\n".join(
        f'    inputs {{ key: "{t.name}", value {{ data_type: TYPE_{t.datatype}, dims: [ {_dims(t)} ], '
        "zero_data: true } }"
        for t in model.inputs
    )
    warm_ups = ",\n".join(f'  {{\n    name: "batch {size}"\n    batch_size: {size}\n{warm}\n  }}' for size in sizes)
    return (
        "\n".join(
            [
                _head(model),
                'backend: "tensorrt"',
                'default_model_filename: "model.plan"',
                f"max_batch_size: {model.max_batch}",
                f"input [\n{tensor_lines(model.inputs)}\n]",
                f"output [\n{tensor_lines(model.outputs)}\n]",
                f"instance_group [ {{ count: 1, {ON_GPU} }} ]",  # without the list: one on every visible GPU
                "dynamic_batching {\n"
                f"  preferred_batch_size: [ {options.opt_batch} ]\n"
                f"  max_queue_delay_microseconds: {QUEUE_DELAY_US}\n"
                f"  default_queue_policy {{ max_queue_size: {MOST_QUEUED} }}\n}}",
                f"optimization {{\n  cuda {{\n    graphs: true\n    output_copy_stream: true\n"
                f"    graph_spec [\n{specs}\n    ]\n  }}\n}}",
                f"model_warmup [\n{warm_ups}\n]",
                "response_cache { enable: false }",
            ]
        )
        + "\n"
    )


def llm_config(options: Options, source: Source, model: Model) -> str:
    """Configuration of TensorRT-LLM's backend, with the contract's subset of its tensors.

    Names, types and shapes are the backend's own.
    """
    llm = options.llm
    parameters = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": f"{options.mount}/llm/1",
        "max_beam_width": "1",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "kv_cache_free_gpu_mem_fraction": str(llm.kv_memory_fraction),
        "enable_kv_cache_reuse": _bool(llm.kv_reuse),
        "enable_chunked_context": "true",
        "exclude_input_in_output": "true",
        "cancellation_check_period_ms": "10",
        "normalize_log_probs": "false",
        "decoding_mode": "top_k_top_p",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
        **{name: UNSET % name for name in ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend")},
        # Properties of the engine, for the gateway and `glimpse verify`. The backend does not read them.
        "max_rows": str(llm.max_batch),
        "engine_max_tokens": str(longest(options, source)),
    }
    lines = [
        f'parameters {{ key: "{name}", value: {{ string_value: "{value}" }} }}' for name, value in parameters.items()
    ]
    return (
        "\n".join(
            [
                _head(model),
                'backend: "tensorrtllm"',
                f"max_batch_size: {llm.max_batch}",
                "model_transaction_policy { decoupled: true }",
                f"input [\n{_backend_lines(model.inputs)}\n]",
                f"output [\n{tensor_lines(model.outputs)}\n]",
                "# The engine sees to its own GPUs: Triton starts one instance and leaves them alone.",
                "instance_group [ { count: 1, kind: KIND_CPU } ]",
                "dynamic_batching {\n"
                f"  preferred_batch_size: [ {llm.max_batch} ]\n"
                "  max_queue_delay_microseconds: 0\n"
                f"  default_queue_policy {{ max_queue_size: {MOST_QUEUED} }}\n}}",
                *lines,
            ]
        )
        + "\n"
    )


def _backend_lines(inputs: tuple[Tensor, ...]) -> str:
    """As `tensor_lines`, with the backend's own conventions.

    Numbers have no dimension. Lists of different lengths may share a batch, and so may strings, which keep theirs.
    """
    lines = []
    for tensor in inputs:
        end = " }"
        if tensor.dims == (1,) and tensor.datatype != "BYTES":
            end = ", reshape: { shape: [ ] } }"
        elif -1 in tensor.dims or tensor.datatype == "BYTES":
            end = ", allow_ragged_batch: true }"
        lines.append(tensor_lines([tensor]).removesuffix(" }") + end)
    return ",\n".join(lines)


def _head(model: Model) -> str:
    return (
        f"# {model.title}\n"
        "# Written by build_engines/convert/profiles.py; the batch dimension is left out of every shape.\n"
        f'name: "{model.name}"'
    )


def _dims(tensor: Tensor) -> str:
    return ", ".join(str(size) for size in tensor.dims)


def _bool(value: bool) -> str:
    return "true" if value else "false"
