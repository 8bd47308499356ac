"""Load BLIP-2, InstructBLIP (also for video) and IDEFICS checkpoints in Hugging Face's format, and allocator weights.

Examples: `reference/` of this project, `Salesforce/blip2-opt-2.7b`, `Salesforce/blip2-flan-t5-xl`,
`Salesforce/instructblip-vicuna-7b` and `HuggingFaceM4/idefics-9b`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    IdeficsForVisionText2Text,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoForConditionalGeneration,
    OPTForCausalLM,
    PreTrainedConfig,
    T5ForConditionalGeneration,
)

from build_engines.model import fingerprint
from build_engines.model.adapted import FIXED, QFORMER, TRAINED, WEIGHTS, ZERO_SHOT, Adapted
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.balancing import SUMMARIES, OpponentProcessing
from build_engines.model.clip import ClipAttention, ClipResampler
from build_engines.model.closer import CloserView
from build_engines.model.decoder import LlamaDecoder, OptDecoder, decoder_of
from build_engines.model.encoder_decoder import T5Decoder, T5Encoder
from build_engines.model.idefics import IdeficsDecoder, IdeficsVisionEncoder, ImageReader, PerceiverResampler
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.model.qformer import InstructQFormer, QFormer
from build_engines.model.vision import VisionEncoder
from build_engines.model.zero_shot import QFormerKnowing, load_image_text
from service.core.card import ImageMarks

logger = logging.getLogger(__name__)

# OpenAI CLIP's statistics, which BLIP-2's image processor uses if a checkpoint does not set its own.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# The prompts for questions that the authors of BLIP-2 and of InstructBLIP evaluated them with: OPT's, and the others'.
PROMPT, SHORT_PROMPT = "Question: {question} Answer:", "Question: {question} Short answer:"
INSTRUCTED = (InstructBlipForConditionalGeneration, InstructBlipVideoForConditionalGeneration)
VIDEO = InstructBlipVideoForConditionalGeneration
FRAMES = 8  # of a clip, if a request does not say
VIDEO_FRAMES = 4  # likewise, of InstructBlipVideo, whose processor takes no other number
FAMILIES = {
    family.__name__: family for family in (Blip2ForConditionalGeneration, *INSTRUCTED, IdeficsForVisionText2Text)
}
QUERIES = 32  # in one group
LATENTS = 64  # of IDEFICS's resampler, which are its visual tokens of an image
IMAGE_SIZE, PATCH_SIZE = 224, 14  # pixels
BEGIN = "<s>"  # a token that begins texts
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
PIXELS = {  # an image processor's settings by name, each with what Glimpse does
    "do_resize": [True],
    "size": [SQUARE, IMAGE_SIZE],
    "image_size": [IMAGE_SIZE, SQUARE],
    "resample": [3],  # bicubic
    "do_center_crop": [False],
    "do_pad": [False],
    "do_rescale": [True],
    "rescale_factor": [1 / 255],
    "do_normalize": [True],
}
AROUND_IMAGE, IMAGE = "<fake_token_around_image>", "<image>"  # IDEFICS's words for an image
T5_POSITIONS = 512  # of FlanT5's training, for a checkpoint that does not tell
CLIP = "clip.safetensors"  # beside the checkpoint's own weights, if it has a clip resampler
CLIP_LANGUAGE = "clip_language.safetensors"  # if the language model has other weights for clips and several images
ALLOCATOR = WEIGHTS  # beside the checkpoint's own weights, if the allocator is trained
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
Module = TypeVar("Module", bound=nn.Module)
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "qformer_tokenizer/*"]


@dataclass(frozen=True)
class Checkpoint:
    """The whole model in FP32 on the CPU, in eval mode."""

    directory: Path
    model: (
        Blip2ForConditionalGeneration
        | InstructBlipForConditionalGeneration
        | InstructBlipVideoForConditionalGeneration
        | IdeficsForVisionText2Text
    )
    participatory: ParticipatoryKnowing | None
    balancing: OpponentProcessing | None
    closer: CloserView | None
    image_mean: list[float]
    image_std: list[float]
    card: dict[str, object]  # model_card.json; empty without this file
    clip: ClipResampler | None = None  # what makes a whole clip's visual tokens
    clip_language: OPTForCausalLM | None = None  # what answers about clips and several images, if not the model's own
    allocator_state: str = FIXED  # how its allocator came about: `adapted`
    zero_shot: QFormerKnowing | None = None  # says where to look, in place of a trained allocator
    image_text: Path | None = None  # where zero_shot was loaded from, if that is another checkpoint

    @classmethod
    def load(cls, source: Path | str, allocator: Path | None = None, *, language: bool = True) -> Checkpoint:
        """Load a directory, or download a repository of the Hugging Face hub by name.

        Reads config.json, the weights, and if present model_card.json, allocator.safetensors and what the processor
        wrote (`preprocessing`). `allocator` is a folder that `glimpse adapt` wrote, whose allocator takes the place of
        the checkpoint's own. Without `language` the language model's weights stay on disk, and it cannot be run. Raises
        OSError for a missing file, and ValueError for another architecture, another preprocessing of pixels, or an
        allocator that was adapted to another model.
        """
        directory = _directory(source)
        architectures = _read_json(directory / "config.json").get("architectures", [])
        family = next((FAMILIES[name] for name in architectures if name in FAMILIES), None)
        if family is None:
            found = architectures or "no architecture"
            raise ValueError(f"{source} holds {found}: use a checkpoint of one of {', '.join(FAMILIES)}")
        model = (
            family.from_pretrained(directory, dtype=torch.float32) if language else _seeing(family, directory)
        ).eval()
        if why := why_not(model.config):
            raise ValueError(f"{source} {why}")
        preprocessor = preprocessing(directory, family)
        if why := why_not_pixels(preprocessor):
            raise ValueError(f"{source} {why}")
        own = load_allocator(directory / ALLOCATOR)
        found = cls(
            directory=directory,
            model=model,
            participatory=own.participatory,
            balancing=own.balancing,
            closer=own.closer,
            image_mean=preprocessor.get("image_mean") or CLIP_MEAN,
            image_std=preprocessor.get("image_std") or CLIP_STD,
            clip=load_clip(directory / CLIP, model),
            clip_language=load_clip_language(directory / CLIP_LANGUAGE, model) if language else None,
            card={"name": Path(source).name} | model_card(directory),
            allocator_state=FIXED if own.participatory is None else TRAINED,
        )
        return found if allocator is None else found.adapted(allocator)

    def knowing_already(self, image_text: Path | None = None) -> Checkpoint:
        """Let a Q-Former that reads the question say where to look: its own, or the one in a folder `image_text`.

        Raises ValueError if its own does not read it, or if `image_text` has another vision encoder.
        """
        if image_text is not None:
            knowing = QFormerKnowing(load_image_text(image_text, self.model.vision_model))
        elif self.reads_question:
            knowing = QFormerKnowing(InstructQFormer(self.model))
        else:
            raise ValueError(f"{self.directory} has a Q-Former that does not read the question: use `glimpse adapt`")
        return dataclasses.replace(
            self,
            participatory=None,
            balancing=None,
            closer=None,
            zero_shot=knowing,
            image_text=image_text,
            allocator_state=ZERO_SHOT,
        )

    def adapted(self, folder: Path) -> Checkpoint:
        """Replace the allocator by one that was adapted to this encoder.

        Raises ValueError for one of another encoder, or of another tokenizer of the question. Its changes of the
        Q-Former fit no other Q-Former.
        """
        told = Adapted.read(folder)
        changes_qformer = told.state != FIXED and (folder / QFORMER).exists()  # fixed ones once had the file too
        of_another = None
        if told.encoder != self.vision_fingerprint():
            of_another = "encoder"
        elif told.question_tokenizer and told.question_tokenizer != self.question_fingerprint():
            of_another = "tokenizer of the question"
        elif told.qformer and changes_qformer and told.qformer != self.qformer_fingerprint():
            of_another = "Q-Former"
        if of_another is not None:
            raise ValueError(
                f"{folder} was adapted to another {of_another}: run `glimpse adapt` with this checkpoint, or build the "
                "one that it was made with"
            )
        if changes_qformer:
            self.model.load_state_dict(load_file(folder / QFORMER), strict=False)
        new = RelevanceAllocator(None) if told.state == FIXED else load_allocator(folder / WEIGHTS)
        return dataclasses.replace(
            self,
            participatory=new.participatory,
            balancing=new.balancing,
            closer=new.closer,
            allocator_state=told.state,
            card=self.card
            | {
                "default_vision_tokens": list(told.default_vision_tokens),
                "closer_view_at": told.closer_view_at,
                "adapted": told.told,
            },
        )

    @property
    def reads_question(self) -> bool:
        """Whether the Q-Former reads the question, in its own tokenizer's ids."""
        return isinstance(self.model, INSTRUCTED)

    @property
    def frames(self) -> int:
        """Frames of a clip that are looked at, if a request does not say."""
        return VIDEO_FRAMES if isinstance(self.model, VIDEO) else FRAMES

    @property
    def is_idefics(self) -> bool:
        """Whether the language model sees images by cross-attention, and a resampler stands in the Q-Former's place."""
        return isinstance(self.model, IdeficsForVisionText2Text)

    @property
    def text_config(self) -> PreTrainedConfig:
        """The language model's configuration; IDEFICS has one for everything."""
        return self.model.config.get_text_config()

    @property
    def vocab_size(self) -> int:
        """V: visual ids start here."""
        return vocabulary(self.text_config)

    @property
    def visual_width(self) -> int:
        """H, the width of a visual token: the language model's, but IDEFICS attends to tokens of the encoder's."""
        return visual_width(self.model.config)

    @property
    def queries(self) -> int:
        """Visual tokens of one group."""
        return LATENTS if self.is_idefics else QUERIES

    @property
    def image_marks(self) -> ImageMarks | None:
        """The words that tell IDEFICS where an image is. Raises ValueError if the tokenizer has none."""
        return image_marks(self.directory, self._own_tokenizer.eos_token_id) if self.is_idefics else None

    @property
    def prompt(self) -> str:
        return SHORT_PROMPT if self.reads_question or self.is_encoder_decoder else PROMPT

    @cached_property
    def end_id(self) -> int:
        """The token that ends an answer. Raises ValueError as `end_of_answers` does."""
        return end_of_answers(self.directory, self.text_config, self.card)

    @cached_property
    def around_text(self) -> tuple[int | None, int | None]:
        """The tokens that transformers' processor puts before and after a prompt's text; None: none.

        The tokenizer decides, not the configuration: the published InstructBLIP-Vicuna was trained with </s> before a
        prompt, and its configuration names <unk>. Raises ValueError for more than one token before or after.
        """
        tokenizer = self._own_tokenizer
        if self.is_idefics:  # IdeficsProcessor writes BOS into the text
            return tokenizer.bos_token_id, None
        bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        before, after = whole[:start], whole[start + len(bare) :]
        if len(before) > 1 or len(after) > 1:
            raise ValueError(
                f"{self.directory} has a tokenizer that puts the tokens {before} before a text and {after} after "
                "it: use one that puts at most one there"
            )
        return next(iter(before), None), next(iter(after), None)

    @cached_property
    def _own_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.directory)

    @property
    def question_tokenizer(self) -> str:
        """The file of the question's ids: of the LLM, or of the Q-Former that reads the question."""
        return "qformer_tokenizer.json" if self.reads_question or self.image_text is not None else "tokenizer.json"

    def tokenizers(self, scratch: Path) -> dict[str, Path]:
        """`tokenizers` files by their name in a repository. Other formats are converted into scratch."""
        found = {"tokenizer.json": self.directory}
        if self.image_text is not None:
            found[self.question_tokenizer] = self.image_text
        elif self.reads_question:
            found[self.question_tokenizer] = self.directory / "qformer_tokenizer"
        return {name: tokenizer_file(folder, scratch / name) for name, folder in found.items()}

    def vision_encoder(self) -> VisionEncoder | IdeficsVisionEncoder:
        if self.is_idefics:
            return IdeficsVisionEncoder(self.model.model.vision_model, self.image_mean, self.image_std).eval()
        return VisionEncoder(self.model.vision_model, self.image_mean, self.image_std).eval()

    def allocator(self) -> RelevanceAllocator:
        trained = (self.participatory, self.balancing, self.closer)
        return RelevanceAllocator(*trained, self.zero_shot, self.queries).eval()

    def qformer(self) -> QFormer | InstructQFormer | PerceiverResampler:
        if self.is_idefics:
            return PerceiverResampler(self.model.model.perceiver_resampler).eval()
        return (InstructQFormer if self.reads_question else QFormer)(self.model).eval()

    def clip_attention(self) -> ClipAttention | None:
        """What attends to a whole clip; None without a clip resampler."""
        return None if self.clip is None else ClipAttention(self.allocator(), self.clip).eval()

    def decoder(self) -> OptDecoder | LlamaDecoder | T5Decoder | IdeficsDecoder:
        """Raises ValueError for a language model family that has no graph."""
        if self.is_idefics:
            return IdeficsDecoder(self.model).eval()
        if self.is_encoder_decoder:
            return T5Decoder(self.model.language_model).eval()
        return decoder_of(self.model.language_model).eval()

    def clip_decoder(self) -> OptDecoder | LlamaDecoder | None:
        """The decoder for clips and several images; None if it is the one for images."""
        return None if self.clip_language is None else decoder_of(self.clip_language).eval()

    def prompt_reader(self) -> T5Encoder | ImageReader | None:
        """What reads a prompt before the decoder: FlanT5's encoder, or the keys and values of IDEFICS's images."""
        if self.is_idefics:
            return ImageReader(self.model).eval()
        return T5Encoder(self.model.language_model).eval() if self.is_encoder_decoder else None

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model is a FlanT5."""
        return not self.is_idefics and isinstance(self.model.language_model, T5ForConditionalGeneration)

    @property
    def decoder_start_id(self) -> int | None:
        """The token with which an encoder-decoder begins an answer, as `generate` chooses it.

        Raises ValueError if the checkpoint names none.
        """
        if not self.is_encoder_decoder:
            return None
        told = self.model.language_model.generation_config
        start = told.bos_token_id if told.decoder_start_token_id is None else told.decoder_start_token_id
        if start is None:
            raise ValueError(
                "the language model's configuration has neither decoder_start_token_id nor bos_token_id, so that an "
                "answer has no first token: add decoder_start_token_id, which is FlanT5's padding token 0"
            )
        return int(start)

    @property
    def max_positions(self) -> int:
        """Tokens of a request, visual tokens and answer included. FlanT5 counts none: it was trained with 512."""
        return text_positions(self.text_config)

    def vision_fingerprint(self) -> str:
        """16 hex digits over everything that a vision feature depends on."""
        vision = self.model.model.vision_model if self.is_idefics else self.model.vision_model
        return self._fingerprint(vision)

    def visual_fingerprint(self) -> str:
        """16 hex digits over everything that an image's visual token depends on."""
        parts = [self.vision_encoder(), self.allocator(), self.qformer()]
        return self._fingerprint(*parts)

    def language_fingerprint(self) -> str:
        """16 hex digits over what an answer's probability depends on besides its visual tokens.

        The language model's weights, in the files' own precision; the prompt and the answer's end; the tokenizers.
        """
        weights = fingerprint.of_language_files(self.directory, (ALLOCATOR, CLIP, CLIP_LANGUAGE))
        prompt, (bos_id, _) = self.card.get("prompt", self.prompt), self.around_text
        told = [str(prompt), str(self.end_id)]
        if not self.is_encoder_decoder and bos_id != self.text_config.bos_token_id:
            told.append(f"BOS {bos_id}")  # if it is, fingerprints are those of the versions that took it from there
        return fingerprint.of_parts(weights, *told, *self._tokenizer_bytes().values())

    def question_fingerprint(self) -> str:
        """16 hex digits over the tokenizer of the question's ids, which an allocator reads."""
        return fingerprint.of_parts(self._tokenizer_bytes()[self.question_tokenizer])

    def qformer_fingerprint(self) -> str:
        """16 hex digits over what makes visual tokens of vision tokens."""
        return self._fingerprint(self.qformer())

    def clip_fingerprint(self) -> str:
        """16 hex digits over all weights that only clips and several images use; empty if there are none."""
        language = [] if self.clip_language is None else [self.clip_language]
        parts = [*([] if self.clip is None else [self.clip]), *language]
        return self._fingerprint(*parts) if parts else ""

    def _fingerprint(self, *modules: nn.Module) -> str:
        return fingerprint.of_modules(*modules, about=repr((self.image_mean, self.image_std)))

    def _tokenizer_bytes(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as scratch:
            return {name: path.read_bytes() for name, path in self.tokenizers(Path(scratch)).items()}


def why_not(config: PreTrainedConfig) -> str:
    """Say what keeps a checkpoint's vision models from being built, and what to use; empty if nothing does."""
    vision = config.vision_config
    if (vision.image_size, vision.patch_size) != (IMAGE_SIZE, PATCH_SIZE):
        return (
            f"sees {vision.image_size} pixels in patches of {vision.patch_size}: "
            f"use a checkpoint with {IMAGE_SIZE} pixels in patches of {PATCH_SIZE}"
        )
    if config.model_type != "idefics":
        if config.num_query_tokens == QUERIES:
            return ""
        return f"has {config.num_query_tokens} queries: use a checkpoint with {QUERIES} query tokens"
    if not config.use_resampler:
        return "has no resampler (use_resampler is false): use an IDEFICS with one, as the published ones have"
    if config.perceiver_config.resampler_n_latents != LATENTS:
        return f"has {config.perceiver_config.resampler_n_latents} latents: use an IDEFICS with {LATENTS} latents"
    return ""


def image_marks(directory: Path, end: int) -> ImageMarks:
    """Look up IDEFICS's words for an image in its tokenizer. Raises ValueError if it has none."""
    tokenizer = _read_tokenizer(directory)
    around, image = (tokenizer.token_to_id(name) for name in (AROUND_IMAGE, IMAGE))
    if around is None or image is None:
        raise ValueError(f"{directory} has a tokenizer without {AROUND_IMAGE} and {IMAGE}: use the checkpoint's own")
    return ImageMarks(around, image, end)


def vocabulary(text: PreTrainedConfig) -> int:
    """Count a language model's ids; IDEFICS's words for an image come after its vocabulary."""
    return int(text.vocab_size) + int(getattr(text, "additional_vocab_size", 0))


def visual_width(config: PreTrainedConfig) -> int:
    """Return the width of a visual token, H."""
    own = config.vision_config if config.model_type == "idefics" else config.get_text_config()
    return int(own.hidden_size)


def text_positions(text: PreTrainedConfig) -> int:
    """Tokens that the language model was trained to see at once, by its text_config."""
    if text.model_type == "t5":
        return int(getattr(text, "n_positions", T5_POSITIONS))
    return int(text.max_position_embeddings)


def end_of_answers(directory: Path, text: PreTrainedConfig, card: Mapping[str, Any]) -> int:
    """Return the token that ends an answer.

    It is model_card.json's `end_id`, else that of generation_config.json, else that of the language model's
    configuration. If that is no token of the vocabulary, or <s>, it is the tokenizer's, and a warning says so: the
    configuration of the published InstructBLIP-Vicuna belongs to another tokenizer. Raises ValueError for several
    tokens, and for none.
    """
    if "end_id" in card:
        return int(card["end_id"])
    told = _read_json(directory / "generation_config.json", default={}).get("eos_token_id")
    told = text.eos_token_id if told is None else told
    named = dict.fromkeys(told if isinstance(told, list) else [told])
    tokenizer = _read_tokenizer(directory)
    spelled = {token: tokenizer.id_to_token(token) for token in named if token is not None and token >= 0}
    ends = [token for token, word in spelled.items() if token < vocabulary(text) and word != BEGIN]
    if len(ends) == 1:
        return ends[0]
    if ends:
        listed = ", ".join(f"{token} ({spelled[token]!r})" for token in ends)
        raise ValueError(
            f"{directory} ends answers at any of the tokens {listed}, and Glimpse ends them at one: write the one that "
            'its answers were trained to end with as "end_id" into model_card.json in the checkpoint\'s folder, for '
            f'example {{"end_id": {ends[-1]}}}'
        )
    own = AutoTokenizer.from_pretrained(directory).eos_token_id
    if own is None:
        raise ValueError(
            f'{directory} names no token that ends an answer: write its id as "end_id" into model_card.json in the '
            "checkpoint's folder"
        )
    logger.warning("%s ends answers at %s, where none can end: Glimpse takes the tokenizer's %s", directory, told, own)
    return int(own)


def why_not_pixels(told: Mapping[str, Any]) -> str:
    """Say which settings of an image processor Glimpse does not follow, and what to do; empty if it follows all.

    Settings that are missing or null are taken as PIXELS has them.
    """
    odd = []
    for name in [name for name in PIXELS if name in told]:
        value = told[name]
        if isinstance(value, Mapping):
            value = {key: size for key, size in value.items() if size is not None}
        if value is not None and value not in PIXELS[name]:
            odd.append(f"{name} {value}")
    for name in ("image_mean", "image_std"):
        value = told.get(name) or CLIP_STD
        if not isinstance(value, list) or len(value) != 3 or not (name == "image_mean" or all(value)):
            odd.append(f"{name} {value}")
    if not odd:
        return ""
    return (
        f"prepares pixels in another way ({', '.join(odd)}): Glimpse squashes an image to {IMAGE_SIZE}x{IMAGE_SIZE} "
        "pixels (bicubic), divides them by 255, subtracts image_mean and divides by image_std. Use a checkpoint that "
        "was trained so. Without normalisation, image_mean is [0, 0, 0] and image_std [1, 1, 1]"
    )


def _directory(source: Path | str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if not HUB_NAME.fullmatch(str(source)):
        raise FileNotFoundError(
            f"{source} is neither a directory nor a hub name: give one, such as Salesforce/blip2-opt-2.7b"
        )
    return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))


def _seeing(family: type[Module], directory: Path) -> Module:
    """The model with every weight except the language model's, in FP32: most of a published checkpoint is that one."""
    with torch.device("meta"):
        model = family(AutoConfig.from_pretrained(directory))
    weights = {}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name in (ALLOCATOR, CLIP, CLIP_LANGUAGE):
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                if "language_model." not in name:
                    weights[name] = file.get_tensor(name).float()
    model.load_state_dict(weights, strict=False, assign=True)
    return model


def save_allocator(allocator: RelevanceAllocator, path: Path) -> None:
    """Save the trained parts, weights rounded to FP16: keys `participatory.*`, `balancing.*`, `closer.*`."""
    weights = {name: weight.half().contiguous() for name, weight in allocator.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def save_clip(resampler: ClipResampler, path: Path) -> None:
    """Save a clip resampler, weights rounded to FP16."""
    weights = {name: weight.half().contiguous() for name, weight in resampler.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def load_clip(path: Path, model: Module) -> ClipResampler | None:
    """Load the clip resampler in this file; None if the file does not exist.

    Its layers have the sizes of the model's Q-Former. Raises ValueError for weights of other sizes, and for a model
    that is no BLIP-2.
    """
    if not path.exists():
        return None
    if not isinstance(model, Blip2ForConditionalGeneration):
        raise ValueError(f"{path} belongs to a BLIP-2 checkpoint: remove it")  # noqa: TRY004  (the file is wrong)
    resampler = ClipResampler(QFormer(model))
    try:
        resampler.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    except RuntimeError as exc:
        raise ValueError(f"{path} does not fit the checkpoint's Q-Former: {exc}. Train it again") from exc
    return resampler.eval()


def save_clip_language(language: OPTForCausalLM, path: Path) -> None:
    """Save the weights that answer about clips and several images, rounded to FP16.

    They are those of the language model's body. Raises ValueError for one that does not tell tokens by the table that
    reads them.
    """
    if not language.config.tie_word_embeddings:
        raise ValueError("the language model has a head of its own, which would be lost: tie its embeddings")
    weights = {name: weight.half().contiguous() for name, weight in language.model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def without_clips(card: Mapping[str, Any]) -> dict[str, Any]:
    """What model_card.json tells of a checkpoint, without the parts that only clips and several images use."""
    told = {name: value for name, value in card.items() if name != "knows_clips"}
    if isinstance(counted := told.get("parameters"), Mapping):
        parts = {Path(file).stem for file in (CLIP, CLIP_LANGUAGE)}
        told["parameters"] = {name: count for name, count in counted.items() if name not in parts}
    return told


def load_clip_language(path: Path, model: Module) -> OPTForCausalLM | None:
    """Load the language model's weights for clips and several images; None if the file does not exist.

    Raises ValueError for weights of other sizes, and for a language model that is no OPT.
    """
    if not path.exists():
        return None
    own = model.language_model if isinstance(model, Blip2ForConditionalGeneration) else None
    if not isinstance(own, OPTForCausalLM) or not own.config.tie_word_embeddings:
        raise ValueError(f"{path} belongs to a BLIP-2 checkpoint with an OPT whose embeddings are tied: remove it")
    language = copy.deepcopy(own)
    try:
        language.model.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    except RuntimeError as exc:
        raise ValueError(f"{path} does not fit the checkpoint's language model: {exc}. Train it again") from exc
    return language.eval()


def load_allocator(path: Path) -> RelevanceAllocator:
    """Load the trained parts in this file; none if the file does not exist.

    Widths are read from the weights, which may have any float type. Raises ValueError for weights of unknown parts, for
    a part that needs a missing part, and for a missing weight.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in (load_file(path) if path.exists() else {}).items():
        part, _, own = name.partition(".")
        found.setdefault(part, {})[own] = weight.float()
    if unknown := found.keys() - {"participatory", "balancing", "closer"}:
        raise ValueError(f"{path} holds weights of unknown parts: {', '.join(sorted(unknown))}. Remove them")
    participatory = balancing = closer = None
    try:
        if own := found.get("participatory"):
            vocabulary, token_width = own["tokens.weight"].shape
            coupling_width, width = own["patch.weight"].shape[0], own["patch_norm.weight"].shape[0]
            participatory = _loaded(ParticipatoryKnowing(vocabulary, width, token_width, coupling_width), own)
        if own := found.get("balancing"):
            hidden, read = own["hidden.weight"].shape
            balancing = _loaded(OpponentProcessing(read - SUMMARIES, hidden), own)
        if own := found.get("closer"):
            closer = _loaded(CloserView(own["norm.weight"].shape[0]), own)
    except (KeyError, RuntimeError) as exc:
        raise ValueError(f"{path} is incomplete: {exc}. Save the allocator again") from exc
    return RelevanceAllocator(participatory, balancing, closer).eval()


def _loaded(module: Module, weights: dict[str, Tensor]) -> Module:
    module.load_state_dict(weights)
    return module


def tokenizer_file(folder: Path, target: Path) -> Path:
    """The folder's tokenizer.json, or its other format (vocab.json, vocab.txt) converted to `target`."""
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json"
    _read_tokenizer(folder).save(str(target))
    return target


def _read_tokenizer(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    found: Tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    return found


def model_card(directory: Path) -> dict[str, Any]:
    """Read model_card.json; empty without this file."""
    return _read_json(directory / "model_card.json", default={})


def preprocessing(directory: Path, family: type[Module]) -> dict:
    """Read what the image processor does, or the video processor. It may be told in several files; the last one wins.

    preprocessor_config.json, video_preprocessor_config.json for a video, processor_config.json.
    """
    video = issubclass(family, VIDEO)
    names = ["preprocessor_config.json", *(["video_preprocessor_config.json"] if video else [])]
    told: dict[str, object] = {}
    for name in names:
        told |= _read_json(directory / name, default={})
    whole = _read_json(directory / "processor_config.json", default={})
    return told | whole.get("video_processor" if video else "image_processor", {})


def _read_json(path: Path, default: dict[str, object] | None = None) -> dict:
    if default is not None and not path.exists():
        return default
    return json.loads(path.read_text())
