"""Random checkpoints of under a megabyte, of every family that is built, saved by transformers as real ones are."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from zlib import crc32

import numpy as np
import safetensors.torch
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AddedToken,
    AutoTokenizer,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
    GenerationConfig,
    GPT2Tokenizer,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Tokenizer,
)

from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.balancing import OpponentProcessing
from build_engines.model.closer import CloserView
from build_engines.model.knowing import ParticipatoryKnowing
from service.core.vision import UInt8Array


class Saved(Protocol):
    """A processor, which is saved beside its model."""

    def save_pretrained(self, directory: Path) -> object: ...


VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
          "image_size": 224, "patch_size": 14, "qkv_bias": True}  # fmt: skip
QFORMER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
           "cross_attention_frequency": 2, "encoder_hidden_size": 48}  # fmt: skip
IMAGE = BlipImageProcessor(size={"height": 224, "width": 224})
VIDEO_TOKEN = "<video>"
MEAN, STD = [0.4, 0.45, 0.5], [0.2, 0.25, 0.3]  # other than CLIP's, to see that they are read
LETTERS = string.ascii_letters + "?:"


def save_blip2_opt(directory: Path) -> None:
    """As `Salesforce/blip2-opt-2.7b`: byte-level BPE with `</s>` first, answers end at a token of its own."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[], add_bos_token=True, **special)
    processor = Blip2Processor(IMAGE, tokenizer, num_query_tokens=32)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = {"model_type": "opt", "hidden_size": 40, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 300, "max_position_embeddings": 200, "word_embed_proj_dim": 40, "bos_token_id": 2,
            "eos_token_id": 13, "pad_token_id": 1}  # fmt: skip
    config = Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=text, num_query_tokens=32, image_token_index=image_id
    )
    _save(Blip2ForConditionalGeneration(config), processor, directory)


def write_blip2_image_text(directory: Path) -> None:
    """As `Salesforce/blip2-itm-vit-g`: the encoder of `save_blip2_opt`, with a layer norm of its own behind it.

    It has no language model, so it is no family that is built.
    """
    words = _words()
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER
        | {"vocab_size": len(words), "max_position_embeddings": 64, "use_qformer_text_input": True},
        num_query_tokens=32,
        image_text_hidden_size=16,
    )
    _save(Blip2ForImageTextRetrieval(config), Blip2Processor(IMAGE, words), directory)
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    for name in ("weight", "bias"):
        own = weights[f"vision_model.post_layernorm.{name}"]
        own += 0.1 * torch.arange(len(own)) / len(own)
    safetensors.torch.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def save_instructblip_vicuna(directory: Path) -> None:
    """As `Salesforce/instructblip-vicuna-7b`, but that two query heads share a key head.

    Its tokenizer begins and ends with </s>. Its configuration is of another tokenizer, as the published one is.
    """
    tokenizer, words = _letters("</s>", bos="</s>", unk="</s>"), _words()
    processor = InstructBlipProcessor(IMAGE, tokenizer, words, num_query_tokens=32)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = {"model_type": "llama", "hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 330, "max_position_embeddings": 256,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}  # fmt: skip
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER | {"vocab_size": len(words), "max_position_embeddings": 64},
        text_config=text,
        num_query_tokens=32,
        image_token_index=image_id,
    )
    _save(InstructBlipForConditionalGeneration(config), processor, directory)


def save_instructblip_video_vicuna(directory: Path) -> None:
    """As an InstructBLIP-Video with a Vicuna."""
    tokenizer, words = with_video_token(_letters("</s>")), _words()
    text = {"model_type": "llama", "hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 330, "max_position_embeddings": 256,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    config = InstructBlipVideoConfig(
        vision_config=VISION,
        qformer_config=QFORMER | {"vocab_size": len(words), "max_position_embeddings": 64},
        text_config=text,
        num_query_tokens=32,
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
    )
    _save(InstructBlipVideoForConditionalGeneration(config), VideoProcessor(tokenizer, words), directory)


def save_instructblip_video_flan_t5(directory: Path) -> None:
    """The same with a FlanT5."""
    tokenizer, words = with_video_token(_unigram()), _words()
    config = InstructBlipVideoConfig(
        vision_config=VISION,
        qformer_config=QFORMER | {"vocab_size": len(words), "max_position_embeddings": 64},
        text_config=FLAN_T5,
        num_query_tokens=32,
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        use_decoder_only_language_model=False,
    )
    _save_flan_t5(InstructBlipVideoForConditionalGeneration(config), VideoProcessor(tokenizer, words), directory)


def with_video_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add the token of a frame's places, as InstructBlipVideoProcessor does."""
    tokenizer.add_tokens([AddedToken(VIDEO_TOKEN, normalized=False, special=True)], special_tokens=True)
    return tokenizer


@dataclass(frozen=True)
class VideoProcessor:
    """Does for one clip what InstructBlipVideoProcessor does, whose part for pixels needs torchvision."""

    tokenizer: PreTrainedTokenizerBase
    qformer_tokenizer: PreTrainedTokenizerBase

    @classmethod
    def from_pretrained(cls, directory: Path) -> VideoProcessor:
        words = AutoTokenizer.from_pretrained(directory / "qformer_tokenizer")
        return cls(AutoTokenizer.from_pretrained(directory), words)

    def save_pretrained(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)
        self.qformer_tokenizer.save_pretrained(directory / "qformer_tokenizer")
        told = {"video_processor_type": "InstructBlipVideoVideoProcessor", "size": {"height": 224, "width": 224},
                "image_mean": MEAN, "image_std": STD}  # fmt: skip
        processor = {"processor_class": "InstructBlipVideoProcessor", "num_query_tokens": 32, "video_processor": told}
        (directory / "processor_config.json").write_text(json.dumps(processor, indent=2))

    def __call__(self, frames: Sequence[UInt8Array], text: str) -> dict[str, torch.Tensor]:
        """`frames` are RGB [3, 224, 224]: nothing has to be resized."""
        words, prompt = self.qformer_tokenizer([text]), self.tokenizer([text])
        places = self.tokenizer(VIDEO_TOKEN * 32 * len(frames), add_special_tokens=False)
        pixels = torch.from_numpy(np.stack(frames)).float() / 255
        mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
        return {
            "pixel_values": ((pixels - mean) / std).unsqueeze(0),
            "qformer_input_ids": torch.tensor(words["input_ids"]),
            "qformer_attention_mask": torch.tensor(words["attention_mask"]),
            "input_ids": torch.tensor([places["input_ids"] + prompt["input_ids"][0]]),
            "attention_mask": torch.tensor([places["attention_mask"] + prompt["attention_mask"][0]]),
        }


def save_idefics(directory: Path) -> None:
    """As `HuggingFaceM4/idefics-9b`: cross-attention every second layer, its marks of images after the vocabulary."""
    tokenizer = _letters("<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<fake_token_around_image>", "<image>"]})
    config = IdeficsConfig(
        vision_config={"embed_dim": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
                       "image_size": 224, "patch_size": 14},
        perceiver_config={"use_resampler": True, "resampler_n_latents": 64, "resampler_depth": 2,
                          "resampler_n_heads": 2, "resampler_head_dim": 12, "qk_layer_norms_perceiver": True},
        use_resampler=True, vocab_size=len(tokenizer) - 2, additional_vocab_size=2, hidden_size=40,
        intermediate_size=80, num_hidden_layers=4, num_attention_heads=4, cross_layer_interval=2, qk_layer_norms=True,
        max_position_embeddings=640, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    _save(IdeficsForVisionText2Text(config), IdeficsProcessor(IdeficsImageProcessorPil(), tokenizer), directory)


def trained_allocator() -> RelevanceAllocator:
    """An allocator for them with random weights in every part: every map, weight and tension has an effect."""
    torch.manual_seed(7)
    width = VISION["hidden_size"]
    participatory = ParticipatoryKnowing(300, width)
    torch.nn.init.constant_(participatory.bias, -2.0)
    allocator = RelevanceAllocator(participatory, OpponentProcessing(participatory.coupling_width), CloserView(width))
    torch.nn.init.normal_(allocator.balancing.out.weight, std=0.5)
    torch.nn.init.normal_(allocator.closer.out.weight, std=0.1)
    return allocator


def _letters(pad: str, bos: str = "<s>", unk: str = "<unk>") -> LlamaTokenizer:
    """Bytes and letters, without merges."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *LETTERS]:
        vocabulary[piece] = len(vocabulary)
    return LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True, pad_token=pad, bos_token=bos, unk_token=unk)


def _words() -> BertTokenizer:
    """The Q-Former's own tokenizer."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", ":"]
    pieces += ["question", "short", "answer", "what", "which", "colour", "has", "the", "big", "circle", "on", "left"]
    pieces += [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase]
    return BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)})


FLAN_T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 40, "d_kv": 12, "d_ff": 72,
           "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 160,
           "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False,
           "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "n_positions": 256,
           "is_encoder_decoder": True, "decoder_start_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
           "pad_token_id": 0}  # fmt: skip


def save_blip2_flan_t5(directory: Path) -> None:
    """As `Salesforce/blip2-flan-t5-xl`: a unigram tokenizer, an encoder, a head that is not the embedding."""
    tokenizer = _unigram()
    processor = Blip2Processor(IMAGE, tokenizer, num_query_tokens=32)
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=FLAN_T5,
        num_query_tokens=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        use_decoder_only_language_model=False,
    )
    _save_flan_t5(Blip2ForConditionalGeneration(config), processor, directory)


def save_instructblip_flan_t5(directory: Path) -> None:
    """As `Salesforce/instructblip-flan-t5-xl`."""
    tokenizer, words = _unigram(), _words()
    processor = InstructBlipProcessor(IMAGE, tokenizer, words, num_query_tokens=32)
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER | {"vocab_size": len(words), "max_position_embeddings": 64},
        text_config=FLAN_T5,
        num_query_tokens=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        use_decoder_only_language_model=False,
    )
    _save_flan_t5(InstructBlipForConditionalGeneration(config), processor, directory)


def _unigram() -> T5Tokenizer:
    """Letters, some words, and T5's sentinels at the end."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in ("Question", "Answer", "Short", "what", "is", "colour", "the", "circle")]
    pieces += [(letter, -6.0) for letter in [*LETTERS, *string.digits, *'{}[]",-./<>_ù']]
    pieces += [(f"<extra_id_{number}>", 0.0) for number in (1, 0)]
    return T5Tokenizer(vocab=pieces, extra_ids=2)


def _save_flan_t5(model: PreTrainedModel, processor: Saved, directory: Path) -> None:
    """With the published text_config: transformers itself writes that T5's embeddings are tied."""
    language = model.language_model
    language.lm_head.weight = torch.nn.Parameter(torch.empty_like(language.shared.weight))
    _save(model, processor, directory)
    config = json.loads((directory / "config.json").read_text())
    del config["text_config"]["scale_decoder_outputs"]
    config["text_config"] |= {"tie_word_embeddings": False, "is_encoder_decoder": True}
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def _save(model: PreTrainedModel, processor: Saved, directory: Path) -> None:
    """With weights that leave no part without a say: norms that are not 1, biases that are not 0.

    Each is drawn by its name alone. So checkpoints of two families have the same vision tower, and the tests export it
    once (shared_exports.py).
    """
    generator = torch.Generator()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator.manual_seed(crc32(name.encode()))
            of_a_norm = parameter.ndim == 1 and bool((parameter == parameter[0]).all())  # or a bias
            spread = 0.2 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * spread + (parameter if of_a_norm else 0)
            )
    text = model.config.get_text_config()
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id if text.pad_token_id >= 0 else None,  # transformers saves no other
    )
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
