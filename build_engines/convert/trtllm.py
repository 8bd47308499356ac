"""Command lines for converting a checkpoint to a TensorRT-LLM 1.2.1 engine. Pure.

1.2.1 is the last version with this flow: `convert_checkpoint.py`, `trtllm-build`, and the C++ backend of Triton that
takes a prompt embedding table. The scripts are in the image `options.LLM_IMAGE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from build_engines.convert.commands import CHECKPOINT, OUT, WORK
from build_engines.convert.options import Options, Refused
from build_engines.convert.source import Source
from service.core.card import ModelCard

EXAMPLES = "/app/examples"
PLAIN, CONVERT, LAST = "llm plain", "llm convert", "llm engine"


class Command(NamedTuple):
    name: str
    does: str
    needs: tuple[str, ...]
    command: tuple[str, ...]


def commands(options: Options, source: Source) -> Iterator[Command]:
    """Yield the commands that run in the image, in order.

    For a Vicuna, `llm plain` runs earlier, in this process.
    """
    yield opt_checkpoint(options) if source.language == "opt" else llama_checkpoint(options)
    yield engine(options, source)


def opt_checkpoint(options: Options) -> Command:
    """Convert the OPT of a BLIP-2, in FP16 for every vision precision: TensorRT-LLM has no FP8 OPT."""
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
    """Convert a Vicuna from the plain Llama directory that `llm plain` saved from an InstructBLIP."""
    model = ("--model_dir", f"{WORK}/{PLAIN.replace(' ', '-')}", "--dtype", "float16",
             "--tp_size", str(options.llm.tensor_parallel), "--output_dir", OUT)  # fmt: skip
    if options.precision == "fp8":
        quantize = ("--qformat", "fp8", "--kv_cache_dtype", "fp8", "--calib_size", "512")
        command = ("python3", f"{EXAMPLES}/quantization/quantize.py", *model, *quantize)
        return Command(CONVERT, "Vicuna to TensorRT-LLM's checkpoint, FP8 with an FP8 KV cache", (PLAIN,), command)
    command = ("python3", f"{EXAMPLES}/models/core/llama/convert_checkpoint.py", *model)
    return Command(CONVERT, "Vicuna to TensorRT-LLM's checkpoint, FP16", (PLAIN,), command)


def engine(options: Options, source: Source) -> Command:
    """Build the engine with these sizes. The server refuses a longer request."""
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
            "--max_multimodal_len", str(visual_rows(options)),
            "--kv_cache_type", "paged",
            "--use_paged_context_fmha", "enable",
            *(("--use_fp8_context_fmha", "enable") if fp8 else ()),
        ),
    )  # fmt: skip


def visual_rows(options: Options) -> int:
    """Rows for the visual tokens of all requests. Each may fill an equal part: a longer table fails the whole batch."""
    return options.llm.max_batch * options.llm.max_visual_tokens


def longest(options: Options, source: Source) -> int:
    """Tokens of a request, visual and generated ones included, within the model's positions."""
    return min(options.llm.max_tokens, source.max_positions)


def check_visual_tokens(card: ModelCard) -> None:
    """Raises Refused if one image can have more visual tokens than the engine takes of a request."""
    most = card.most_visual_tokens
    if most is not None and most < card.visual_tokens[1]:
        raise Refused(
            f"--llm-max-visual-tokens {most}: one image can have {card.visual_tokens[1]} visual tokens. Use at least "
            f"{card.visual_tokens[1]}"
        )


class WrongEngine(Exception):
    """The built engine differs from the options."""


def check_engine(engine: Mapping[str, Any], options: Options, source: Source) -> None:
    """Compare the engine's config.json with the options. Raises WrongEngine.

    Virtual ids start at the engine's own vocabulary size. Padding for tensor parallelism would change that size, and a
    visual token would then be read as a word.
    """
    pretrained, build = engine["pretrained_config"], engine["build_config"]
    found = {
        "vocab_size": pretrained["vocab_size"],
        "hidden_size": pretrained["hidden_size"],
        "max_seq_len": build["max_seq_len"],
        "max_batch_size": build["max_batch_size"],
        "max_prompt_embedding_table_size": build["max_prompt_embedding_table_size"],
    }
    wanted = {
        "vocab_size": source.vocab_size,
        "hidden_size": source.hidden_size,
        "max_seq_len": longest(options, source),
        "max_batch_size": options.llm.max_batch,
        "max_prompt_embedding_table_size": visual_rows(options),
    }
    if found != wanted:
        raise WrongEngine(f"the engine has {found}, not {wanted}: build it again with these sizes")
