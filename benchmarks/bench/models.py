"""Provide the measured models: `reference`, as shipped, and `base`, with realistic sizes.

`base` is a BLIP-2 of random weights: ViT-B/14 (768 wide, 12 layers, 224 pixels), Q-Former 768 x 12 with 32 queries,
OPT-125M. It is built once into build/bench (1.8 GB), as a Hugging Face checkpoint and, by build_engines.export, as a
Triton repository. It never ends an answer: every answer has `max_tokens` tokens, in every system.

    python -m benchmarks.bench.models       # builds `base` if it is missing, which takes minutes
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
BUILD = PROJECT / "build" / "bench"
VOCABULARY = 50_272  # OPT's
MERGES = 2_000  # vocabulary that the tokenizer trains; the other ids only occur in answers
SEED = 7


@dataclass(frozen=True, slots=True)
class Model:
    """One checkpoint and the repository that was exported from it."""

    name: str
    title: str  # for reports
    checkpoint: Path
    repository: Path
    max_tokens: int  # per answer
    slo_s: float  # an answer within this time counts as good


REFERENCE = Model(
    "reference", "The reference model (4 M parameters)", PROJECT / "reference", PROJECT / "model_repository", 8, 1.0
)
BASE = Model(
    "base",
    "ViT-B/14, Q-Former, OPT-125M, 16 tokens an answer",
    BUILD / "base" / "checkpoint",
    BUILD / "base" / "repository",
    16,
    5.0,
)
MADE_BY = BASE.repository.parent / "made_by"
MODELS = {model.name: model for model in (REFERENCE, BASE)}


def ready(name: str) -> Model:
    """Return the model; build it first if it is missing, which needs PyTorch.

    The build runs in a separate process, so PyTorch does not stay in memory. Raises KeyError, CalledProcessError.
    """
    model = MODELS[name]
    if model is BASE and not (MADE_BY.exists() and MADE_BY.read_text() == exporter()):
        subprocess.run([sys.executable, "-m", "benchmarks.bench.models"], cwd=PROJECT, check=True)
    return model


def exporter() -> str:
    """Return a fingerprint of the code that makes `base`; if it changes, checkpoint and repository are rebuilt."""
    folders = (PROJECT / "build_engines", PROJECT / "build_engines" / "model", PROJECT / "service" / "core")
    sources = [Path(__file__), *sorted(source for folder in folders for source in folder.glob("*.py"))]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def build_base() -> None:
    """Build `base`; its folders get their final names at the end, so an incomplete one is never used."""
    from build_engines.export import export  # noqa: PLC0415  (PyTorch, in the building process only)

    checkpoint, repository = (path.with_suffix(".part") for path in (BASE.checkpoint, BASE.repository))
    for path in (checkpoint, repository):
        shutil.rmtree(path, ignore_errors=True)
    save_base(checkpoint)
    shutil.rmtree(BASE.checkpoint, ignore_errors=True)
    checkpoint.rename(BASE.checkpoint)
    export(BASE.checkpoint, repository)
    shutil.rmtree(BASE.repository, ignore_errors=True)
    repository.rename(BASE.repository)
    MADE_BY.write_text(exporter())


def save_base(directory: Path) -> None:
    """Save the checkpoint in FP32, the type in which PyTorch and ONNX Runtime compute on CPUs."""
    import torch  # noqa: PLC0415
    from transformers import Blip2Config, Blip2ForConditionalGeneration, GenerationConfig  # noqa: PLC0415

    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 224, "patch_size": 14, "qkv_bias": True}  # fmt: skip
    qformer = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
               "cross_attention_frequency": 2, "encoder_hidden_size": 768, "vocab_size": 32}  # fmt: skip
    text = {"model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
            "word_embed_proj_dim": 768, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=32, image_token_index=4
    )
    torch.manual_seed(SEED)
    model = Blip2ForConditionalGeneration(config)
    initialise(model)
    # Without an end token transformers' generate stops at max_new_tokens. The card's end id of -1 does the same below.
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=1)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BlipImageProcessor", "size": {"height": 224, "width": 224}})
    )
    card = {
        "name": "glimpse-base-random",
        "end_id": -1,
        "visual_tokens": [32, 128],
        "note": "random weights, for measuring speed only",
    }
    (directory / "model_card.json").write_text(json.dumps(card))


def initialise(model: object) -> None:
    """Draw weights of variance 1 / fan-in and norms near 1.

    transformers initialises BLIP-2's vision model with 1e-10, which outputs nothing.
    """
    import torch  # noqa: PLC0415

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1.0 + 0.1 * torch.randn_like(parameter) if "norm" in name.lower() and
                                name.endswith("weight") else 0.02 * torch.randn_like(parameter))  # fmt: skip
            else:
                embedding = "embed" in name or "query_tokens" in name
                fan_in = parameter.shape[-1] if embedding else parameter[0].numel()
                parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)


def tokenizer() -> object:
    """Make a byte-level BPE tokenizer that splits a question into about as many tokens as OPT's.

    It can decode all ids of OPT's vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    from build_engines.train.tokens import SPECIALS  # noqa: PLC0415

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        questions(),
        trainers.BpeTrainer(
            vocab_size=MERGES,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    vocabulary |= {f"Ġw{i}": i for i in range(len(vocabulary), VOCABULARY)}
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]]))
    whole.add_special_tokens(list(SPECIALS))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], model_max_length=2048,
    )  # fmt: skip


def questions() -> Iterator[str]:
    """Yield the prompts of the committed scenes' questions."""
    from build_engines.evaluation.accuracy import SCENES, rows  # noqa: PLC0415

    for row in rows(SCENES):
        yield f"Question: {row.question} Answer:"


if __name__ == "__main__":
    build_base()
