"""Make inputs of the graphs for calibration and parity, from images and questions.

The images and questions run through the FP32 graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from build_engines import left_out
from build_engines.convert.options import Refused
from build_engines.convert.pictures import PLAIN_QUESTIONS, pictures
from build_engines.model.allocation import CELL_COUNT, PATCH_COUNT
from build_engines.repository import CLIP_GRAPH
from build_engines.scenes.questions import TYPES, ask
from build_engines.scenes.render import render
from build_engines.scenes.world import World, sample_scene
from service.core.errors import GlimpseError
from service.core.prompt import Question
from service.core.request import Budget
from service.core.vision import CLOSER_SIZE, CROPS, CloserFeatures, VisionFeatures
from service.media.decoder import Decoded, ImageLimits, decode
from service.text.prompt import PromptBuilder
from triton_models.session import Array, Graph

SEED = 907  # used for no other scenes
PARITY = 16  # samples for which the inputs of every graph are kept; a multiple of BATCH
BATCH = 4
VISION_BUDGETS = ((64, 64), (64, 112), (64, 160), (64, 256), (256, 256))

Sample = tuple[np.ndarray, str]  # RGB uint8 [3, 224, 224] and a question


def samples(
    images: Path | None, count: int, *, again: bool = False, skipped: dict[str, str] | None = None
) -> list[Sample]:
    """Return `count` samples from the folder's images, or rendered scenes without a folder.

    Each is of another image. `again`: if there are too few, images are asked their further questions too. Questions
    about one image follow each other. `skipped` gets the files and lines that cannot be used, with the reason. Raises
    Refused if there are too few.
    """
    if images is None:
        return list(islice(_rendered(), count))
    skipped = {} if skipped is None else skipped
    found = pictures(images)
    skipped |= found.skipped
    usable = list(islice(_decoded(found.asked, images, skipped), count))
    turns = max((len(texts) for _, texts in usable), default=0) if again else 1
    chosen = [(place, turn) for turn in range(turns) for place, (_, texts) in enumerate(usable) if turn < len(texts)]
    if len(chosen) < count:
        what = "questions about images" if again else "images that are asked about"
        raise Refused(
            f"{images} has {len(chosen)} {what}, fewer than {count}: add some or use another --images folder"
            + (f". {left_out.told(skipped)}" if skipped else "")
        )
    return [(usable[place][0], usable[place][1][turn]) for place, turn in sorted(chosen[:count])]


def _decoded(
    asked: Iterable[tuple[Path, list[str]]], folder: Path, skipped: dict[str, str]
) -> Iterator[tuple[np.ndarray, list[str]]]:
    for path, texts in asked:
        try:
            yield decode(path.read_bytes(), ImageLimits()).pixels, texts
        except (GlimpseError, OSError) as exc:
            skipped[str(path.relative_to(folder))] = str(exc)


def _rendered() -> Iterator[Sample]:
    index = 0
    while True:
        rng = np.random.default_rng((SEED, index))
        things = sample_scene(rng, World())
        asked = ask(rng, things, TYPES[index % len(TYPES)])
        pixels = render(things, rng).pixels
        yield np.ascontiguousarray(pixels.transpose(2, 0, 1)), asked.text if asked else PLAIN_QUESTIONS[0]
        index += 1


def feeds(
    given: Sequence[Sample], graphs: Mapping[str, Path], prompts: PromptBuilder, kept: int = PARITY
) -> dict[str, dict[str, Array]]:
    """Inputs of the first `kept` samples, by graph and input name, from the outputs of the FP32 graphs.

    The encoder's are those of all samples, for calibration. With a closer view, every other one of the rest is a crop
    of such a view. `llm` gets visual tokens and text ids.
    """
    opened = {name: Graph(path) for name, path in graphs.items() if name != "llm"}
    encoder, allocator, qformer = (opened[name] for name in ("vision_encoder", "relevance_allocator", "qformer"))
    found: dict[str, dict[str, list[Array]]] = {}
    clips: dict[str, dict[str, Array]] = {}
    closer = opened.get("relevance_allocator_448")
    budgets, queries = cycle(VISION_BUDGETS), prompts.card.queries
    for start in tqdm(range(0, len(given), BATCH), desc="samples", unit="batch", mininterval=1.0):
        part = given[start : start + BATCH]
        image = {"image": np.stack([pixels for pixels, _ in part])}
        if start >= kept:
            _keep(found, "vision_encoder", image if closer is None else _with_crops(image, start // BATCH))
            continue
        seen = _run(encoder, image)
        asked = [prompts.question(text) for _, text in part]
        question = {
            "question_ids": np.stack([q.ids for q in asked]),
            "question_mask": np.stack([q.mask for q in asked]),
        }
        budget = np.stack([Budget(pair, (queries, queries)).to_array() for pair, _ in zip(budgets, part, strict=False)])
        to_allocator = _fitting(allocator, seen | question | {"budget": budget})
        chosen = _run(allocator, to_allocator)
        to_qformer = _fitting(qformer, chosen | question | {"attend": (chosen["vision_mask"] > 0).astype(np.int32)})
        visual = _run(qformer, to_qformer)["visual_tokens"]
        steps = {
            "vision_encoder": image,
            "relevance_allocator": to_allocator,
            "qformer": to_qformer,
            "llm": _llm(prompts, part, visual),
        }
        if closer is not None:
            steps["relevance_allocator_448"] = to_allocator | {"detail_features": _closer(encoder, image["image"])}
        if start == 0 and CLIP_GRAPH in opened:
            clips = _clip(seen, asked[0])
        for name, arrays in steps.items():
            _keep(found, name, arrays)
    return clips | {
        name: {key: np.concatenate(parts) for key, parts in inputs.items()} for name, inputs in found.items()
    }


def _keep(found: dict[str, dict[str, list[Array]]], graph: str, arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        found.setdefault(graph, {}).setdefault(name, []).append(array)


def _with_crops(image: Mapping[str, Array], turn: int) -> dict[str, Array]:
    """Take a crop of the closer view in place of every other image, and each of its four crops in turn."""
    pixels = image["image"].copy()
    for row in range(1, len(pixels), 2):
        pixels[row] = _crops(pixels[row])[(turn + row // 2) % CROPS]
    return {"image": pixels}


def _clip(seen: Mapping[str, Array], question: Question) -> dict[str, dict[str, Array]]:
    """One clip, whose frames are the first images. It has no batch dimension."""
    times = np.linspace(0, 1, len(seen["features"]), dtype=np.float32)
    asked = {"question_ids": question.ids, "question_mask": question.mask}
    return {CLIP_GRAPH: {**seen, **asked, "times": times, "clip_budget": np.array([CELL_COUNT, PATCH_COUNT], np.int32)}}


def _run(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    names = list(graph.outputs)
    return dict(zip(names, graph.run(inputs, names), strict=True))


def _fitting(graph: Graph, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays that the graph reads."""
    return {name: arrays[name] for name in graph.inputs}


def _crops(pixels: Array) -> Array:
    """An image [3, 224, 224], doubled in size, to its four crops [4, 3, 224, 224]."""
    doubled = pixels.repeat(2, axis=1).repeat(2, axis=2)
    return Decoded({CLOSER_SIZE: doubled}, CLOSER_SIZE, CLOSER_SIZE).crops


def _closer(encoder: Graph, image: Array) -> Array:
    """Images [B, 3, 224, 224], doubled in size, to the patches of four crops on one grid: [B, 1024, D]."""
    rows = []
    for pixels in image:
        seen = _run(encoder, {"image": _crops(pixels)})
        crops = zip(*(seen[field.name] for field in fields(VisionFeatures)), strict=True)
        rows.append(CloserFeatures.joined([VisionFeatures(*crop) for crop in crops]).features)
    return np.stack(rows)


LONGEST_TEXT = 96  # tokens


def _llm(prompts: PromptBuilder, part: Sequence[Sample], visual: Array) -> dict[str, Array]:
    """visual_tokens [B, 32 or 64, H], text_ids int32 [B, 96] padded, text_lengths int32 [B]."""
    ids = np.zeros((len(part), LONGEST_TEXT), np.int32)
    lengths = np.zeros(len(part), np.int32)
    for row, (_, text) in enumerate(part):
        own = prompts.text_ids(text)[:LONGEST_TEXT]
        ids[row, : len(own)], lengths[row] = own, len(own)
    return {"visual_tokens": visual[:, : prompts.card.queries], "text_ids": ids, "text_lengths": lengths}
