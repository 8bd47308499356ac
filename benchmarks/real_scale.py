"""Export models of real size with random weights and count their size and operations.

    python -m benchmarks.real_scale --out benchmarks/results/real_scale.json     # every component, one after another
    python -m benchmarks.real_scale --only vit-g qformer                          # some of them

Each component is built from its published configuration and exported to ONNX in FP32. Weights of more than 2 GB are
stored beside the graph. The whole graph is checked, also against TensorRT's rules. Each component has its own process,
whose peak memory is the component's. Counted are parameters, floating-point operations (`build_engines.model.flops`),
the most bytes that one node of the graph reads and writes for one image in FP16, and the bytes of keys and values per
token.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

# Published: open_clip's docs/model_profile.csv (image tower, 40 layers for ViT-g; BLIP-2 drops the last), OPT's paper
# (2.7 B) and BLIP-2's paper (188 M for the Q-Former with BERT's text half, which answering does not use).
PUBLISHED = {
    "vit-g": {"parameters": 1012.59e6 * 39 / 40, "gflops": 534.06 * 39 / 40},
    "vit-l": {"parameters": 303.97e6, "gflops": 162.03},
    "qformer": {"parameters": 188e6},
    "opt-2.7b": {"parameters": 2.65e9},
}
VIT_G = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
         "image_size": 224, "patch_size": 14, "qkv_bias": True}  # fmt: skip
VIT_L = VIT_G | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
OPT_27B = {"model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
           "num_attention_heads": 32, "vocab_size": 50304, "max_position_embeddings": 2048,
           "word_embed_proj_dim": 2560}  # fmt: skip
SMALL_VIT = VIT_G | {"num_hidden_layers": 1}  # has ViT-g's width, which the Q-Former reads
SMALL_OPT = OPT_27B | {"num_hidden_layers": 1}
COMPONENTS = {  # the sizes, and the graph that is exported
    "vit-g": ({"vision_config": VIT_G, "text_config": SMALL_OPT}, "vision_encoder"),
    "vit-l": ({"vision_config": VIT_L, "text_config": SMALL_OPT}, "vision_encoder"),
    "allocator": ({"vision_config": SMALL_VIT, "text_config": SMALL_OPT}, "relevance_allocator"),
    "qformer": ({"vision_config": SMALL_VIT, "text_config": SMALL_OPT}, "qformer"),
    "opt-2.7b": ({"vision_config": SMALL_VIT, "text_config": OPT_27B}, "llm"),
}
VISION_TOKENS = 257
PROMPT_TOKENS = 32 + 16  # visual tokens and a short question


def measure(name: str, scratch: str, told: Any) -> None:
    """Measure one component; run in its own process."""
    told.send(component(name, Path(scratch)))


def component(name: str, scratch: Path) -> dict[str, Any]:
    import onnx  # noqa: PLC0415  (in the component's own process)
    from transformers import Blip2Config  # noqa: PLC0415

    from build_engines.convert.tensorrt_rules import MAY_VARY, faults  # noqa: PLC0415
    from build_engines.export import export_graph, graphs  # noqa: PLC0415

    sizes, wanted = COMPONENTS[name]
    config = Blip2Config(**sizes, num_query_tokens=32)  # the Q-Former's defaults are the published ones
    checkpoint = random_checkpoint(config)
    graph = next(graph for graph in graphs(checkpoint) if graph.name == wanted)
    own = {id(p): p.numel() for p in graph.module.parameters()}
    started = time.monotonic()
    path = scratch / f"{wanted}.onnx"
    export_graph(graph, path)
    exported = onnx.load(path, load_external_data=False)
    wrong = faults(exported, MAY_VARY[wanted]) if wanted in MAY_VARY else None
    return {
        "graph": wanted,
        "parameters": sum(own.values()),
        "gflops": round(gflops(name, config) / 1e9, 2),
        "file_bytes": sum(file.stat().st_size for file in scratch.iterdir()),
        "weights_beside_the_graph": any(file.suffix == ".data" for file in scratch.iterdir()),
        "nodes": len(exported.graph.node),
        "tensorrt_would_not_build": wrong,
        "most_bytes_of_a_node_fp16": largest_node(exported),
        "kv_bytes_per_token_fp16": kv_bytes(config.text_config) if wanted == "llm" else None,
        "export_s": round(time.monotonic() - started, 1),
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "published": PUBLISHED.get(name),
    }


def random_checkpoint(config: Any, device: str = "cpu", *, half: bool = False) -> Any:
    """Make a BLIP-2 of these sizes directly on the device, in FP32 or FP16."""
    import torch  # noqa: PLC0415
    from transformers import Blip2ForConditionalGeneration  # noqa: PLC0415

    from build_engines.model.checkpoint import CLIP_MEAN, CLIP_STD, Checkpoint  # noqa: PLC0415

    torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    model = (model.half() if half else model).to_empty(device=device).eval()
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return Checkpoint(Path(), model, None, None, None, CLIP_MEAN, CLIP_STD, {"name": "random"})


def gflops(name: str, config: Any) -> float:
    from build_engines.model import flops  # noqa: PLC0415

    match COMPONENTS[name][1]:
        case "vision_encoder":
            return flops.encoder(config.vision_config)
        case "relevance_allocator":
            return flops.allocator(config.vision_config.hidden_size, participatory=False, balancing=False)
        case "qformer":
            return flops.qformer(config, [VISION_TOKENS])
        case _:
            return flops.prefill(config.text_config, PROMPT_TOKENS)


def kv_bytes(text: Any) -> int:
    return 2 * text.num_hidden_layers * text.hidden_size * 2


def largest_node(model: Any) -> int:
    """Return the most bytes of activations that one node reads and writes, for batch 1 and FP16 floats."""
    from onnx import TensorProto  # noqa: PLC0415

    graph = model.graph
    varying = {
        "batch": 1,
        "vision_tokens": VISION_TOKENS,
        "length": PROMPT_TOKENS,
        "visual_tokens": 32,
        "past_length": 0,
    }
    sizes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = [
            dim.dim_value if dim.HasField("dim_value") else varying.get(dim.dim_param, 1) for dim in tensor.shape.dim
        ]
        width = {TensorProto.FLOAT: 2, TensorProto.INT64: 8, TensorProto.INT32: 4}.get(tensor.elem_type, 1)
        sizes[value.name] = width * math.prod(dims)
    fixed = {constant.name for constant in graph.initializer}
    for node in graph.node:  # transposed weights are not activations
        if fixed.issuperset(node.input):
            fixed.update(node.output)
    return max(sum(sizes.get(name, 0) for name in {*node.input, *node.output} - fixed) for node in graph.node)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(COMPONENTS), default=list(COMPONENTS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    kept = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    for name in given.only:
        scratch = tempfile.mkdtemp(prefix=f"{name}-")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(name, scratch, theirs))
        process.start()
        theirs.close()
        try:
            kept[name] = ours.recv()
        except EOFError:
            raise SystemExit(f"{name} ended without a result: check that there is enough memory") from None
        finally:
            process.join()
            shutil.rmtree(scratch)
        print(name, json.dumps(kept[name], indent=2), flush=True)
        if given.out:
            given.out.write_text(json.dumps({key: kept[key] for key in COMPONENTS if key in kept}, indent=2) + "\n")


if __name__ == "__main__":
    main()
