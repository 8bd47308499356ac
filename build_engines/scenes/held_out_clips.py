"""Generate the clips that the service is measured on.

`python -m build_engines.scenes.held_out_clips` writes build_engines/evaluation/clips. The seeds of these clips are used
nowhere else. The files are MP4: Pillow's animated WebP and GIF leave out a frame that equals the one before.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from build_engines.scenes.balance import Balance
from build_engines.scenes.clips import CLIP_KINDS, SceneClip, Story, ask_story, draw_story, shoot
from build_engines.scenes.held_out import SEED
from build_engines.scenes.questions import Question
from build_engines.scenes.world import IMAGE_SIZE, World

CLIPS = "clips"
SPLIT = 3  # of the seeds; 0 to 2 are the splits of single images
COMMITTED = 40
FRAMES = 32
QUESTIONS = 8  # of a clip
QUESTIONS_OF_A_KIND = 2  # of a clip
REPEATED = (1, 1, 2, 1, 1, 3)  # least events of one kind, of each clip in turn
MOST_OF_A_KIND = 40  # questions of all clips
STORIES = 24  # drawn for a clip, of which the one is kept that has the rarest kinds of questions
FRAMES_PER_S = 8
CONSTANT_RATE_FACTOR = 24  # 0 is lossless, 23 is x264's default
DIRECTORY = Path(__file__).parents[1] / "evaluation" / CLIPS


@dataclass(frozen=True)
class HeldOutClip:
    """One clip with its questions."""

    name: str  # of its file
    clip: SceneClip
    questions: list[Question]


def held_out_clips(number: int = COMMITTED, frames: int = FRAMES, first: int = 0) -> Iterator[HeldOutClip]:
    """Yield the same clips every time, each with two or three events. `first` is the first one's seed.

    Kinds and answers are balanced over the clips so far. A clip thus depends on those before it, but not on those
    after it.
    """
    balance = Balance(CLIP_KINDS, MOST_OF_A_KIND * max(1, number // COMMITTED))
    for index in range(first, first + number):
        rng = np.random.default_rng((SEED, SPLIT, index))
        stories = [_eventful(rng, REPEATED[index % len(REPEATED)]) for _ in range(STORIES)]
        story = max(stories, key=lambda one: balance.worth(partial(ask_story, rng, one)))
        questions = balance.choose(partial(ask_story, rng, story), QUESTIONS, QUESTIONS_OF_A_KIND)
        clip = shoot(story, frames)
        yield HeldOutClip(f"{CLIPS}_{index:03d}.mp4", clip, questions)


def _eventful(rng: np.random.Generator, repeated: int) -> Story:
    """Draw a story with two events or more, so many of them of one kind."""
    while True:
        story = draw_story(rng, World())
        kinds = Counter(event.kind for event in story.events)
        if kinds.total() > 1 and max(kinds.values()) >= repeated:
            return story


def save(pixels: Iterable[np.ndarray], path: Path) -> None:
    """Write frames, uint8 [224, 224, 3] each, as an MP4 (H.264)."""
    import av  # noqa: PLC0415 - only to write clips

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=FRAMES_PER_S)
        stream.width = stream.height = IMAGE_SIZE
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "crf": str(CONSTANT_RATE_FACTOR),
            "preset": "slow",
            "threads": "1",
        }  # the same file every time
        for frame in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def write(directory: Path = DIRECTORY, number: int = COMMITTED) -> None:
    """Write the clips, and last the questions as JSON lines: clip, question, answer, type, split."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for held_out in held_out_clips(number):
        save(held_out.clip.pixels, directory / held_out.name)
        lines += [
            {"clip": held_out.name, "question": q.text, "answer": q.answer, "type": q.type, "split": CLIPS}
            for q in held_out.questions
        ]
    (directory / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    write()
