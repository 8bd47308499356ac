"""Checkpoint -> TensorRT-LLM 1.2.1 engine: the steps' command lines. Pure.

1.2.1 is the last version with this flow (`convert_checkpoint.py`, `trtllm-build`, the C++ backend of Triton that takes
a prompt embedding table). The scripts lie in the image of `options.LLM_IMAGE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from build_engines.convert.commands import CHECKPOINT, OUT, WORK
from build_engines.convert.options import Options
from build_engines.convert.source import Source

EXAMPLES = "/app/examples"
PLAIN, CONVERT, LAST = "llm plain", "llm convert", "llm engine"


class Command(NamedTuple):
    name: str
    does: str
    needs: tuple[str, ...]
    command: tuple[str, ...]


def commands(options: Options, source: Source) -> Iterator[Command]:
    """What is run in the image, in order; `llm plain` of a Vicuna is made before, in this process."""
    yield opt_checkpoint(options) if source.language == "opt" else llama_checkpoint(options)
    yield engine(options, source)


def opt_checkpoint(options: Options) -> Command:
    """OPT out of BLIP-2: FP16 whatever the vision side is, as TensorRT-LLM has no FP8 for it."""
    return Command(
        CONVERT,
        "OPT to TensorRT-LLM's checkpoint, FP16",
        (),
        (
            "python3", f"{EXAMPLES}/models/contrib/opt/convert_checkpoint.py",
            "--model_type", "blip2",
            "--model_dir", CHECKPOINT,
            "--dtype", "float16",
            "--tp_size", str(options.llm.tensor_parallel),
            "--output_dir", OUT,
        ),
    )  # fmt: skip


def llama_checkpoint(options: Options) -> Command:
    """Vicuna, from the plain Llama directory that `llm plain` saved out of InstructBLIP."""
    model = ("--model_dir", f"{WORK}/{PLAIN.replace(' ', '-')}", "--dtype", "float16",
             "--tp_size", str(options.llm.tensor_parallel), "--output_dir", OUT)  # fmt: skip
    if options.precision == "fp8":
        quantize = ("--qformat", "fp8", "--kv_cache_dtype", "fp8", "--calib_size", "512")
        command = ("python3", f"{EXAMPLES}/quantization/quantize.py", *model, *quantize)
        return Command(CONVERT, "Vicuna to TensorRT-LLM's checkpoint, FP8 with an FP8 KV cache", (PLAIN,), command)
    command = ("python3", f"{EXAMPLES}/models/core/llama/convert_checkpoint.py", *model)
    return Command(CONVERT, "Vicuna to TensorRT-LLM's checkpoint, FP16", (PLAIN,), command)


def engine(options: Options, source: Source) -> Command:
    """The sizes are those of the engine: a longer request is refused by the server."""
    llm = options.llm
    fp8 = source.language == "llama" and options.precision == "fp8"
    return Command(
        LAST,
        "TensorRT-LLM engine",
        (CONVERT,),
        (
            "trtllm-build",
            "--checkpoint_dir", f"{WORK}/{CONVERT.replace(' ', '-')}",
            "--output_dir", OUT,
            "--gemm_plugin", "fp8" if fp8 else "float16",
            "--max_beam_width", "1",
            "--max_batch_size", str(llm.max_batch),
            "--max_input_len", str(longest(options, source) - 1),
            "--max_seq_len", str(longest(options, source)),
            "--max_multimodal_len", str(llm.max_batch * llm.max_visual_tokens),
            "--kv_cache_type", "paged",
            "--use_paged_context_fmha", "enable",
            *(("--use_fp8_context_fmha", "enable") if fp8 else ()),
        ),
    )  # fmt: skip


def longest(options: Options, source: Source) -> int:
    """Tokens of a request, visual and generated ones included: no more than the model has positions for."""
    return min(options.llm.max_tokens, source.max_positions)


def cache_bytes_per_token(layers: int, kv_heads: int, head_dim: int, kv_bytes: int) -> int:
    """Of keys and values together."""
    return 2 * layers * kv_heads * head_dim * kv_bytes


class WrongEngine(Exception):
    """The engine is not the one that was asked for."""


def check_engine(engine: Mapping[str, Any], options: Options, source: Source) -> None:
    """`engine` is its config.json. Virtual ids start at the engine's own vocabulary size, which padding for tensor
    parallelism would change: then a visual token would be read as a word. Raises WrongEngine."""
    pretrained, build = engine["pretrained_config"], engine["build_config"]
    found = {
        "vocab_size": pretrained["vocab_size"],
        "hidden_size": pretrained["hidden_size"],
        "max_seq_len": build["max_seq_len"],
        "max_batch_size": build["max_batch_size"],
    }
    wanted = {
        "vocab_size": source.vocab_size,
        "hidden_size": source.hidden_size,
        "max_seq_len": longest(options, source),
        "max_batch_size": options.llm.max_batch,
    }
    if found != wanted:
        raise WrongEngine(f"the engine has {found}; asked for was {wanted}")
