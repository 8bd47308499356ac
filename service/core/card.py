"""Describe a model repository's models: the model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, Self

from blake3 import blake3

from service.core.confidence import Calibration
from service.core.frames import MAX_FRAMES
from service.core.precision import NotOffered
from service.core.request import Budget, Detail, Request
from service.core.tensors import DETAIL, DTYPES, MAX_MESSAGE_BYTES, VISION, Tensor
from service.core.viewport import AskedFit, Colour
from service.core.vision import CLIP_VISUAL_TOKENS, CLOSER_SIZE, IMAGE_SIZE, MAX_VISION_TOKENS, MAX_VISUAL_TOKENS

LLM_ENCODER = "encoder.onnx"  # beside the LLM's model.onnx, if it is an encoder-decoder or attends to images
LLM_CLIPS = "clips.onnx"  # beside it, if the LLM has weights of its own for clips and several images
OTHER_MESSAGE_BYTES = 64 * 1024  # of a request for `attend_clip`, beside its features
TUPLES = ("vision_tokens", "visual_tokens", "default_visual_tokens", "default_vision_tokens", "pad_colour")


def of_precision(fingerprint: str, precision: str) -> str:
    """Return the fingerprint of the same weights computed in another precision than FP32."""
    return blake3(f"{fingerprint} {precision}".encode()).hexdigest()[:16]


LLM_TOKENIZER = "tokenizer.json"  # a file beside the card


@dataclass(frozen=True, slots=True)
class Engines:
    """How much the models process at once, according to their configurations."""

    encoder_images: int = 1  # the vision encoder's batch, times its instances
    llm_rows: int = 16  # requests that the LLM decodes at once


@dataclass(frozen=True, slots=True)
class ImageMarks:
    """The ids of words in the text of an LLM that sees images by cross-attention (IDEFICS).

    An image's place reads `around`, its visual tokens, `image`, `around`. Images without a text between them share an
    `around`. A token sees the last image before it, or none after `end`.
    """

    around: int  # before and after images
    image: int  # stands for one image
    end: int  # of a document: the tokens after it see no image, up to the next one


@dataclass(frozen=True, slots=True)
class ClipResampler:
    """What `attend_clip` makes of a whole clip. Without it, each frame is looked at as an image is."""

    visual_tokens: int  # of the clip
    frames: int  # the most
    vision_tokens: tuple[int, int]  # least and most of all frames together
    fingerprint: str = ""  # of its weights, and of the LLM's for clips and several images

    def budget(self, asked: Budget) -> Budget:
        """Return the budget of a whole clip: what of the asked one it can spend.

        Its visual tokens are always the same. A question about a clip alone was refused if it asked for others.
        """
        least, most = self.vision_tokens
        low, high = (min(max(tokens, least), most) for tokens in asked.vision_tokens)
        return Budget((low, high), (self.visual_tokens, self.visual_tokens))

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """Raises ValueError for a clip resampler that the gateway cannot use; TypeError, KeyError for other fields."""
        known = {name: value for name, value in told.items() if name != "trained_frames"}  # older cards have it
        found = cls(**known | {"vision_tokens": tuple(told["vision_tokens"])})
        if found.visual_tokens != CLIP_VISUAL_TOKENS:
            raise ValueError(f"clip.visual_tokens is {found.visual_tokens}, and {CLIP_VISUAL_TOKENS} are read")
        if type(found.frames) is not int or not 1 <= found.frames <= MAX_FRAMES:
            raise ValueError(f"clip.frames is {found.frames}: 1 to {MAX_FRAMES} are possible")
        least, most = found.vision_tokens
        if not 1 <= least <= most:
            raise ValueError(f"clip.vision_tokens is [{least}, {most}], which is not [least, most]")
        return found


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The description of a model repository's models (`card.json` beside them)."""

    name: str
    fingerprint: str  # of the vision encoder's weights: keys the feature cache
    visual_fingerprint: str  # of all weights up to an image's visual tokens: keys the LLM's reuse of keys and values
    vocab_size: int  # V: visual ids start here
    hidden_size: int  # H: the width of a visual token; that of the LLM, or D if `image_marks` are given
    vision_width: int  # D
    bos_id: int | None  # before the prompt's text; None: the LLM has learnt none
    end_id: int
    pad_id: int
    max_positions: int  # visual + text + generated tokens of one request
    prompt_template: str  # with {question}
    allocator_trained: bool
    vision_tokens: tuple[int, int]  # least and most that a budget can ask for
    visual_tokens: tuple[int, int]  # the same
    default_visual_tokens: tuple[int, int] = (32, 32)  # for a request whose budget has no visual_tokens
    default_vision_tokens: tuple[int, int] | None = None  # the same of vision_tokens, without a closer view; None: all
    # How the allocator came about: trained on answers, distilled from the full view, zero-shot (from what the
    # checkpoint knows), or fixed (relevance does not depend on the question). Empty: not told.
    allocator: str = ""
    # Whether the LLM has learnt to read images inside a question's text. If not, they come before that text, wherever
    # the caller put them: BLIP-2's and InstructBLIP's LLMs know no other place.
    interleaved: bool = False
    system_template: str = ""  # before the first question's template, with {system}; empty if the LLM has learnt none
    closer_view: bool = False  # whether the repository has `attend_448`, so that cells can be at level 2
    closer_view_at: float = 1.0  # detail "auto" looks closer if `particularize` reaches this
    frames: int = 8  # the most frames of a clip that are looked at, if a request does not say
    clip: ClipResampler | None = None  # None: the repository has no `attend_clip`
    clip_weights: bool = False  # whether the LLM has weights of its own for clips and several images
    fit: AskedFit = "squash"  # of images that are not square, if a request does not say: BLIP-2's own way
    pad_colour: Colour = (123, 117, 104)  # R, G, B of padding: the mean that the encoder subtracts; CLIP's and BLIP-2's
    # The id with which an encoder-decoder (FlanT5) begins its answer; None: the LLM is decoder-only. The encoder reads
    # visual tokens and text in both directions, so prompts that begin alike share no keys and values.
    decoder_start_id: int | None = None
    text_end_id: int | None = None  # after the prompt's text; None: nothing
    image_marks: ImageMarks | None = None  # None: visual tokens stand in the prompt's text as words do
    # The tokenizer of `question_ids`, a file beside the card. If it is not the LLM's, a Q-Former reads the question by
    # it, between its special tokens: InstructBLIP's reads the LLM's whole prompt. One for image-text retrieval, which
    # says where a BLIP-2 looks, reads the bare question (`question_alone`).
    question_tokenizer: str = LLM_TOKENIZER
    question_alone: bool = False
    float_type: str = "FP32"  # Triton's type of features, vision tokens and visual tokens: FP16 on GPUs
    text_type: str = "UINT8"  # Triton's type of texts for the LLM: BYTES for TensorRT-LLM
    # Of one request, all its images together; None: as many as there are positions.
    most_visual_tokens: int | None = None
    guides: bool = True  # whether the LLM can keep an answer to choices, a regular expression or a schema
    precision: str = "fp32"  # in which the models compute
    # By CPU precision other than FP32: how many questions were asked, and the share of answers equal to FP32's.
    precisions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    top_log_probs: bool = False  # whether the LLM tells the likeliest tokens beside each of its own
    # Of what an answer depends on besides its visual tokens: the LLM's weights, the prompt, the tokenizers. Empty in a
    # card of a build that did not tell it.
    language_fingerprint: str = ""
    confidence: Calibration | None = None  # None: answers carry no confidence, and metadata.confidence says why
    metadata: Mapping[str, object] = field(default_factory=dict)  # shown in GET /v1/models: licence, accuracy, source

    def computed_in(self, precision: str) -> Self:
        """Return the card of the same models computed in another precision.

        Its fingerprints differ, because a cache must not mix the features of two precisions. Raises NotOffered for
        models that were built for a GPU.
        """
        if precision == self.precision:
            return self
        if self.precision != "fp32":
            raise NotOffered(
                f"the models were built in {self.precision} for a GPU: leave the precision out, or build with "
                "--profile embedded"
            )
        return dataclasses.replace(
            self,
            precision=precision,
            fingerprint=of_precision(self.fingerprint, precision),
            visual_fingerprint=of_precision(self.visual_fingerprint, precision),
            language_fingerprint=self.language_fingerprint and of_precision(self.language_fingerprint, precision),
        )

    @property
    def looks_by(self) -> str:
        """Name what decides what is seen for a question, besides weights: the question as it is read, and how strange
        an image is."""
        reads_prompt = self.question_tokenizer != LLM_TOKENIZER and not self.question_alone
        strangeness = "" if self.confidence is None else self.confidence.digest
        return f"{strangeness} {self.question_tokenizer} {self.prompt_template if reads_prompt else ''}"

    @property
    def architecture(self) -> Literal["decoder-only", "encoder-decoder", "cross-attention"]:
        """Name the kind of LLM."""
        if self.image_marks is not None:
            return "cross-attention"
        return "decoder-only" if self.decoder_start_id is None else "encoder-decoder"

    @property
    def queries(self) -> int:
        """Count the visual tokens that one run of the Q-Former, or of IDEFICS's resampler, makes."""
        return MAX_VISUAL_TOKENS // (4 if self.image_marks is None else 2)

    @property
    def feature_shapes(self) -> dict[int, dict[str, tuple[int, ...]]]:
        """Give the shapes of the encoder's output by view size in pixels: fields of VisionFeatures, CloserFeatures."""
        sizes = self.sizes
        return {
            IMAGE_SIZE: {tensor.name: tensor.shape(sizes) for tensor in VISION},
            CLOSER_SIZE: {"features": DETAIL.shape(sizes)},
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Give the sizes of the letters in the dimensions of the tensors that the gateway sends and reads."""
        return {"D": self.vision_width, "H": self.hidden_size}

    def sized(self, tensor: Tensor) -> Tensor:
        """Give a tensor that the gateway sends or reads the type and the sizes of these models."""
        return tensor.sized(self.float_type, self.sizes, self.text_type)

    def type_of(self, feature: str) -> str:
        """Return Triton's type of one array in `feature_shapes`."""
        return next(self.sized(tensor).datatype for tensor in VISION if tensor.name == feature)

    @property
    def most_frames(self) -> int:
        """Count the frames of one clip that can be looked at. The features of those that are joined go in a message."""
        if self.clip is None:
            return MAX_FRAMES
        shapes = self.feature_shapes[IMAGE_SIZE]
        frame = sum(prod(shape) * DTYPES[self.type_of(name)].itemsize for name, shape in shapes.items())
        return min(self.clip.frames, (MAX_MESSAGE_BYTES - OTHER_MESSAGE_BYTES) // frame)

    @property
    def called(self) -> tuple[str, ...]:
        """List the models that questions call. `see` and `attend` run every model of an image's 224-pixel view."""
        closer = ["attend_448"] if self.closer_view else []
        clip = [] if self.clip is None else ["attend_clip"]
        return ("see", "attend", *closer, *clip, "llm")

    def uses_clip_weights(self, request: Request) -> bool:
        """Whether the LLM answers with its weights for clips and several images."""
        return self.clip_weights and (request.clip is not None or len(request.images) > 1)

    def tells_confidence(self, request: Request) -> bool:
        """Whether the answer has a confidence. One image's calibration says nothing about a clip."""
        if self.confidence is None:
            return False
        if self.uses_clip_weights(request):
            return self.confidence.several is not None
        return request.clip is None

    def vision_tokens_for(self, detail: Detail) -> tuple[int, int]:
        """Return the least and the most vision tokens that a budget can ask for at this detail."""
        least, most = self.vision_tokens
        return (least, MAX_VISION_TOKENS) if self.closer_view and detail != "low" else (least, most)

    def unasked_vision_tokens(self, detail: Detail) -> tuple[int, int]:
        """Return the vision tokens of a request without a budget of them, at this detail."""
        least, most = self.vision_tokens_for(detail)
        if self.default_vision_tokens is None:
            return least, most
        low, high = self.default_vision_tokens
        return low, high if most == self.vision_tokens[1] else most

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of a card.json. Raises ValueError, which names the missing or unknown field."""
        try:
            fields = json.loads(text)
            tuples = {name: tuple(value) for name, value in fields.items() if name in TUPLES and value is not None}
            told = fields.pop("confidence", None)
            confidence = None if told is None else Calibration.from_json(told, fields["vision_width"])
            marks = fields.pop("image_marks", None)
            image_marks = None if marks is None else ImageMarks(**marks)
            clip = fields.pop("clip", None)
            clip = None if clip is None else ClipResampler.from_json(clip)
            return cls(**fields | tuples, confidence=confidence, image_marks=image_marks, clip=clip)
        except (TypeError, AttributeError, KeyError, ValueError) as exc:
            raise ValueError(f"not a model card: {exc}") from exc

    def to_json(self) -> str:
        """Write the text of a card.json."""
        told: dict[str, Any] = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        told["clip"] = None if self.clip is None else dataclasses.asdict(self.clip)
        told["image_marks"] = None if self.image_marks is None else dataclasses.asdict(self.image_marks)
        told["confidence"] = None if self.confidence is None else self.confidence.to_json()
        return json.dumps(told, indent=2) + "\n"
