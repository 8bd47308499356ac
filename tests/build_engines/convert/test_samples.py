"""What a build asks about the pictures of `--images`, and what its graphs read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from build_engines.convert.options import Refused
from build_engines.convert.samples import PARITY, Sample, feeds, samples
from service.core.card import ModelCard
from service.text.prompt import PromptBuilder

LEVELS = {"a.png": 10, "b.png": 20, "c.png": 30}  # of grey


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, level in LEVELS.items():
        Image.new("RGB", (224, 224), (level,) * 3).save(tmp_path / name)
    return tmp_path


def told(found: Sequence[Sample]) -> list[tuple[int, str]]:
    """The grey level of each sample's image, and its question."""
    return [(int(np.unique(pixels).item()), question) for pixels, question in found]


def test_a_line_with_a_tab_is_a_question_about_its_image(folder: Path) -> None:
    (folder / "questions.txt").write_text("c.png\twhat is it?\nb.png\twhere?\tthere\nb.png\thow many?\tnone\n")
    assert told(samples(folder, 2)) == [(20, "where?"), (30, "what is it?")]
    assert told(samples(folder, 2, again=True)) == [(20, "where?"), (30, "what is it?")]
    assert told(samples(folder, 3, again=True)) == [(20, "where?"), (20, "how many?"), (30, "what is it?")]
    with pytest.raises(Refused, match="has 2 images that are asked about, fewer than 3"):
        samples(folder, 3)
    with pytest.raises(Refused, match="has 3 questions about images, fewer than 4"):
        samples(folder, 4, again=True)


def test_calibration_keeps_the_encoders_inputs_alone_and_shows_it_crops(
    repository: Path, card: ModelCard, prompts: PromptBuilder
) -> None:
    assert card.closer_view
    names = ("vision_encoder", "relevance_allocator", "relevance_allocator_448", "qformer")
    graphs = {name: repository / name / "1" / "model.onnx" for name in names}
    given = samples(None, PARITY + 4)
    found = feeds(given, graphs, prompts)
    pixels, images = np.stack([pixels for pixels, _ in given]), found["vision_encoder"]["image"]
    assert found["relevance_allocator_448"]["detail_features"].shape[:2] == (PARITY, 1024)
    assert {len(array) for name in (*names[1:], "llm") for array in found[name].values()} == {PARITY}
    plain = [*range(PARITY), PARITY, PARITY + 2]
    np.testing.assert_array_equal(images[plain], pixels[plain])
    assert len(images) == len(pixels)
    for row in (PARITY + 1, PARITY + 3):  # the top left and the top right quarter, each pixel four times
        half = pixels[row][:, :112, :112] if row == PARITY + 1 else pixels[row][:, :112, 112:]
        np.testing.assert_array_equal(images[row], half.repeat(2, axis=1).repeat(2, axis=2))
    del graphs["relevance_allocator_448"]
    np.testing.assert_array_equal(feeds(given, graphs, prompts)["vision_encoder"]["image"], pixels)
    assert len(feeds(given, graphs, prompts, kept=len(given))["qformer"]["attend"]) == len(given)


def test_a_plain_list_of_questions_goes_round_the_images(folder: Path) -> None:
    (folder / "questions.txt").write_text("what is it?\n\nwhere?\n")
    assert told(samples(folder, 3)) == [(10, "what is it?"), (20, "where?"), (30, "what is it?")]
    (folder / "questions.txt").write_text("what is it?\r\nwhat\u2028else?\n", "utf-8-sig")
    assert told(samples(folder, 2)) == [(10, "what is it?"), (20, "what\u2028else?")]
    (folder / "questions.txt").unlink()
    assert told(samples(folder, 1)) == [(10, "what is in the picture?")]


def test_a_file_that_is_no_image_is_left_out_and_told(folder: Path) -> None:
    whole = (folder / "b.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "b2.jpg").mkdir()
    (folder / "questions.txt").write_text("c.png\twhat is it?\na.png\twhat?\nb.png\twhere?\nz.png\thow?\n")
    skipped: dict[str, str] = {}
    assert told(samples(folder, 2, skipped=skipped)) == [(20, "where?"), (30, "what is it?")]
    assert skipped.keys() == {"a.png", "z.png"}
    assert "damaged or cut short" in skipped["a.png"]
    with pytest.raises(Refused, match=r"has 2 images .*, fewer than 3: .*2 files or lines are left out: .*a\.png: the"):
        samples(folder, 3)


@pytest.mark.parametrize(
    ("text", "why"), [("\n \n", r"questions\.txt has no question"), ("z.png\twhat?\n", "no question of .* is about")]
)
def test_questions_of_which_none_can_be_used_are_refused(folder: Path, text: str, why: str) -> None:
    (folder / "questions.txt").write_text(text)
    with pytest.raises(Refused, match=why):
        samples(folder, 1)
