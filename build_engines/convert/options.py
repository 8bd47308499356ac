"""The options of a build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PRECISIONS = {
    "embedded": ("fp32", "bf16", "int8", "int4"),
    "onnx-gpu": ("fp32", "fp16"),
    "tensorrt": ("fp16", "fp8"),
}  # by profile
WHY_NOT = {
    "embedded": "ONNX Runtime computes FP16 and FP8 about four times slower than FP32 on a CPU",
    "onnx-gpu": "ONNX Runtime's CUDA provider has no FP8 matrix products: FP8 needs --profile tensorrt",
    "tensorrt": "TensorRT-LLM's engines are FP16 or FP8, and the prompt embedding table has their type",
}
GPU_PRECISIONS = ("fp16", "fp8")  # of the graphs themselves; a CPU's other precisions stand beside FP32's graphs
DEFAULT_PRECISION = {"embedded": "fp32", "onnx-gpu": "fp16", "tensorrt": "fp16"}
LEAST_CALIBRATION_IMAGES = 500  # with fewer, FP8 ranges depend on chance

VISION_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"
LLM_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"  # the last with TensorRT-LLM 1.2.1's engine flow


HERE = (
    "tensorrt",
    "tensorrt_cu12",
    "tensorrt_cu13",
    "tensorrt_llm",
)  # packages that build, if they are not in a container


class Refused(Exception):
    """The checkpoint, the options or the machine do not allow the build. The message says what is wrong."""


@dataclass(frozen=True)
class LlmEngine:
    """Options of the TensorRT-LLM engine."""

    tensor_parallel: int = 1  # GPUs that share one copy of the model
    max_batch: int = 64  # sequences decoded at once
    max_tokens: int = 1024  # of one request: visual tokens, prompt and answer
    max_visual_tokens: int = 512  # of one request, all its images together
    kv_memory_fraction: float = 0.85  # of the GPU memory that is free after the engine is loaded
    kv_reuse: bool = True  # for prompts with equal prefixes, by prompt_table_extra_ids


@dataclass(frozen=True)
class Options:
    """Options of one build.

    Builds with equal options and equal checkpoints give equal repositories.
    """

    checkpoint: str
    out: Path
    profile: str = "embedded"
    precision: str = ""  # the profile's default if empty
    allocator: Path | None = None  # a folder that `glimpse adapt` wrote
    zero_shot: bool = False  # whether InstructBLIP's Q-Former says where to look
    image_text: str = ""  # a checkpoint for image-text retrieval, whose Q-Former says where BLIP-2 looks
    images: Path | None = None  # for calibration and parity, with questions.txt; None: rendered scenes
    images_digest: str = ""  # of the names and bytes of these files
    calibration_images: int = 512
    agreement_questions: int = 256  # asked in FP32 and in another precision of the CPU, to compare the answers
    vision_batch: int = 8  # maximum images in a batch
    opt_batch: int = 4  # batch size that a plan is tuned for, in images
    llm: LlmEngine = field(default_factory=LlmEngine)
    run_in: str = "docker"  # where TensorRT is: a container of the serving image, or "here"
    installed: Mapping[str, str] = field(default_factory=dict)  # versions of HERE that are installed, if it is "here"
    vision_image: str = VISION_IMAGE
    llm_image: str = LLM_IMAGE
    mount: str = "/models"  # path of the repository in the serving container

    @property
    def dtype(self) -> str:
        """Triton's type of features, vision tokens and visual tokens."""
        return "FP16" if self.precision in GPU_PRECISIONS else "FP32"

    @property
    def work(self) -> Path:
        """Folder of the steps' outputs, from which the next run continues."""
        return self.out.parent / f"{self.out.name}.build"


def checked(options: Options) -> Options:
    """Return the options with the precision filled in.

    Raises Refused for options that do not fit together.
    """
    if options.profile not in PRECISIONS:
        raise Refused(f"--profile {options.profile} is unknown: choose one of {', '.join(PRECISIONS)}")
    precision = options.precision or DEFAULT_PRECISION[options.profile]
    if precision not in PRECISIONS[options.profile]:
        raise Refused(
            f"--profile {options.profile} is built in {' or '.join(PRECISIONS[options.profile])}, not {precision}: "
            f"{WHY_NOT[options.profile]}"
        )
    if not 1 <= options.opt_batch <= options.vision_batch:
        raise Refused(f"--opt-batch {options.opt_batch} must be between 1 and --max-batch {options.vision_batch}")
    if precision == "fp8" and options.calibration_images < LEAST_CALIBRATION_IMAGES:
        raise Refused(
            f"--calibration-images {options.calibration_images} is too few for FP8: "
            f"use at least {LEAST_CALIBRATION_IMAGES}"
        )
    if options.agreement_questions < 1:
        raise Refused(f"--agreement-questions {options.agreement_questions} must be at least 1")
    if not 0 < options.llm.kv_memory_fraction < 1:
        raise Refused(f"--kv-memory-fraction {options.llm.kv_memory_fraction} must be between 0 and 1, both exclusive")
    return Options(**{**vars(options), "precision": precision})
