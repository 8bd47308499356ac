"""`glimpse ask` about videos: what is sent for which file, and the picture of the frames."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image as Pillow
from typer.testing import CliRunner

from service.cli.ask import Show, Subject, ask_about, require_drawable, sorted_out
from service.cli.batch import Asking, Images, Question, Service
from service.cli.client import AskFailed
from service.cli.drawing import png as encoded
from service.cli.film_strip import explain_clip
from service.cli.main import app
from service.cli.pace import Pace
from tests.support import films
from tests.support.documents import filled, pdf
from tests.support.fakes import png

PLAIN = Show(as_json=False, explain=None, named=False, sure=False)
ID = "img_" + "0" * 31
AREA = (0.0, 0.25, 1.0, 0.75)


def map_at(index: int) -> list[list[float]]:
    return np.full((16, 16), round(0.01 * index, 4)).tolist()


def said(indices: Sequence[int], *, time: bool = True, area: Sequence[float] = (0, 0, 1, 1)) -> dict[str, Any]:
    """An answer of a service that looked at these frames."""
    frames = [
        {"index": index}
        | ({"time_s": index / films.FRAMES_PER_S} if time else {})
        | {"relevance": {"map": map_at(index), "levels": [[0] * 8] * 8, "tensions": {}, "area": list(area)}}
        for index in indices
    ]
    return {"answer": "right", "vision": {"frames": frames, "vision_tokens": 256, "visual_tokens": 64}}


class Answering:
    """Stand in for a service: keep each file under the next id, and answer every question."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer
        self.kept: list[bytes] = []
        self.asked: list[dict[str, Any]] = []
        self.client = httpx.Client(base_url="http://glimpse", transport=httpx.MockTransport(self.respond))

    def respond(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/images":
            self.kept.append(request.content)
            return httpx.Response(200, json={"id": f"{ID}{len(self.kept)}"})
        self.asked.append(json.loads(request.content))
        if self.asked[-1].pop("stream", False):
            return httpx.Response(200, text=f"data: {json.dumps({'delta': 'right'})}\n\ndata: [DONE]\n\n")
        return httpx.Response(200, json=self.answer)


@pytest.fixture
def service() -> Iterator[Answering]:
    answering = Answering(said([0, 3]))
    yield answering
    answering.client.close()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    contents = {
        "film": films.video(),
        "mp4": films.video(container="mp4"),
        "gif": films.gif(),
        "still": films.gif(1),
        "png": png(),
        "other": png((1, 2, 3)),
    }
    contents |= {"document": pdf([filled((255, 255, 255))])}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return {name: str(tmp_path / name) for name in contents}


@pytest.mark.parametrize(
    ("name", "field"), [("film", "video"), ("mp4", "video"), ("gif", "video"), ("still", "image"), ("png", "image")]
)
def test_the_content_of_a_file_says_whether_it_is_a_video(service, files, capsys, name, field):
    ask_about(service.client, Subject((files[name],)), ["which way?", "what moves?"], {"max_tokens": 3}, show=PLAIN)
    assert service.kept == [Path(files[name]).read_bytes()]
    assert service.asked == [
        {"max_tokens": 3, field: f"{ID}1", "question": question} for question in ("which way?", "what moves?")
    ]
    assert capsys.readouterr().out == "which way? right\nwhat moves? right\n"


def test_images_as_frames_are_one_video(service, files):
    ask_about(service.client, Subject((files["png"], ID + "7", files["other"]), True), ["?"], {}, show=PLAIN)
    assert service.asked == [{"frames": [f"{ID}1", f"{ID}7", f"{ID}2"], "question": "?"}]


@pytest.mark.parametrize(("asked", "field"), [({}, "image"), ({"video_frames": 4}, "video")])
def test_an_id_is_a_videos_if_frames_of_it_are_asked_for(service, asked, field):
    ask_about(service.client, Subject((ID + "7",)), ["?"], asked, show=PLAIN)
    assert service.asked == [asked | {field: f"{ID}7", "question": "?"}]


@pytest.mark.parametrize("asked", [{"video_frames": 4}, {"video_sampling": "change"}])
def test_an_image_has_no_frames_to_choose_from(service, files, asked):
    with pytest.raises(AskFailed, match=r"png is no video: leave --frames and --sampling out, or take images as"):
        ask_about(service.client, Subject((files["png"],)), ["?"], asked, show=PLAIN)
    assert not service.kept


@pytest.mark.parametrize(
    ("names", "as_frames", "asked", "show", "told"),
    [
        (["film"], False, {"page": 2}, PLAIN, "film is a video, which has no pages: leave --page out"),
        (["png"] * 33, True, {}, PLAIN, "--as-frames takes 1 to 32 images, and 33 are named"),
        (["png", "film"], True, {}, PLAIN, "film is a video: --as-frames takes images"),
        (["document", "png"], True, {}, PLAIN, "document is a document: --as-frames takes images"),
    ],
)
def test_what_would_be_refused_is_told_before_anything_is_sent(service, files, names, as_frames, asked, show, told):
    subject = Subject(tuple(files[name] for name in names), as_frames)
    with pytest.raises(AskFailed, match=told):
        ask_about(service.client, subject, ["?"], asked, show=show)
    assert not service.kept
    assert not service.asked


def test_a_clip_that_cannot_be_drawn_is_told_as_that(service, files, tmp_path):
    service.answer = said([0, 99])
    show = Show(as_json=False, explain=tmp_path / "looked.png", named=False, sure=False)
    with pytest.raises(AskFailed, match=r"^cannot draw .*gif: the service looked at other frames than"):
        ask_about(service.client, Subject((files["gif"],)), ["?"], {"explain": True}, show=show)
    assert not (tmp_path / "looked.png").exists()


def test_options_of_a_batch_are_for_the_lines_that_can_have_them():
    options = {"video_frames": 4, "video_sampling": "change", "page": 2, "max_tokens": 3}
    lines: dict[str, dict[str, Any]] = {"image": {"image": "a.pdf"}, "images": {"images": ["a.png"]}}
    lines |= {"video": {"video": "a.mp4"}, "frames": {"frames": ["a.png"]}}
    given = {
        name: set(Question(1, json.dumps(line).encode(), options).fields()) - set(line) for name, line in lines.items()
    }
    assert given == {
        "image": {"page", "max_tokens"},
        "images": {"max_tokens"},
        "video": {"video_frames", "video_sampling", "max_tokens"},
        "frames": {"video_frames", "video_sampling", "max_tokens"},
    }
    own = Question(1, b'{"image": "a.png", "video_frames": 2}', options).fields()
    assert own["video_frames"] == 2  # the service says what is wrong with it


def test_a_missing_video_is_told_from_a_question():
    assert sorted_out(["a.png", "no/film.MP4", "x.webm", "what?"]) == (["a.png", "no/film.MP4", "x.webm"], ["what?"])


def test_the_strip_is_written_beside_the_answer(service, files, tmp_path, capsys):
    show = Show(as_json=False, explain=tmp_path / "looked.png", named=False, sure=False)
    ask_about(service.client, Subject((files["gif"],)), ["which way?"], {"explain": True}, show=show)
    assert capsys.readouterr().out == "right\n"
    with Pillow.open(tmp_path / "looked.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1920, 909))


@pytest.mark.parametrize(
    ("words", "frames"),
    [
        (["mp4", "--frames", "3"], 3),
        (["gif", "--frames", "2", "--sampling", "uniform"], 2),
        (["png", "other", "--as-frames"], 2),
    ],
)
def test_a_service_answers_about_a_video_and_it_is_drawn(server, files, tmp_path, words, frames):
    named = [files.get(word, word) for word in words]
    names, options = [each for each in named if "/" in each], [each for each in named if "/" not in each]
    target = tmp_path / "looked.png"
    asked = ["ask", *names, "which way?", *options, "--json", "--explain", str(target), "--url", server.url]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    seen = json.loads(result.stdout)["vision"]["frames"]
    assert (len(seen), [len(each["relevance"]["map"]) for each in seen]) == (frames, [16] * frames)
    assert target.stat().st_size > 10_000


def test_frames_by_their_ids_cannot_be_drawn(files, tmp_path):
    with pytest.raises(AskFailed, match="name its file, not its id"):
        require_drawable(tmp_path / "x.png", [Subject((files["png"], ID + "7"), True)], ["?"])
    require_drawable(tmp_path / "x.png", [Subject((files["png"], files["other"]), True)], ["?"])


def test_a_batch_sends_the_files_of_videos_once(service, files):
    asking = Asking(Service(service.client, Pace(1)), Images(Service(service.client, Pace(1)), Path()))
    lines = [{"video": files["film"], "question": "?"}, {"frames": [files["png"], files["png"]], "question": "?"}]
    answers = [asking.answer(Question(line, json.dumps(asked).encode(), {})) for line, asked in enumerate(lines, 1)]
    assert [asked.get("video", asked.get("frames")) for asked in service.asked] == [f"{ID}1", [f"{ID}2"] * 2]
    assert [answer.get("video", answer.get("frames")) for answer in answers] == [files["film"], [files["png"]] * 2]


def panels(figure: Figure) -> tuple[list[Axes], list[Axes]]:
    """The frames, and their maps."""
    squares = [axes for axes in figure.axes if axes.images]
    return [axes for axes in squares if len(axes.images) == 1], [axes for axes in squares if len(axes.images) == 2]


def layer(axes: Axes, number: int) -> np.ndarray:
    return np.asarray(axes.images[number].get_array())


def redness_at(picture: np.ndarray) -> float:
    """Where the square stands, as a share of the width."""
    return float(np.nonzero(picture[112, :, 1] < 128)[0].mean() / 224)


@pytest.mark.parametrize("indices", [[0, 2, 5, 7, 9], [0, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_each_frame_stands_over_its_map(indices):
    figure = explain_clip(films.gif(10), "which way?", said(indices), most=len(indices))
    frames, maps = panels(figure)
    assert [axes.get_title(loc="left") for axes in frames] == [f"frame {i}, {i / 5:.2f} s" for i in indices]
    for index, frame, of in zip(indices, frames, maps, strict=True):
        assert redness_at(layer(frame, 0)) == pytest.approx((16 + index * 80 / 9) / 112, abs=0.02)
        assert np.array_equal(layer(of, 1), map_at(index))
        assert of.get_position().y1 < frame.get_position().y0
        assert of.get_position().x0 == frame.get_position().x0


def test_frames_that_were_chosen_by_change_are_found():
    frames, _ = panels(explain_clip(films.gif(30), "which way?", said([0, 11, 23]), most=8))
    assert [round(redness_at(layer(frame, 0)), 1) for frame in frames] == [0.1, 0.4, 0.7]


def test_images_are_drawn_in_order_without_times():
    figure = explain_clip([png((9, 9, 9)), png((200, 30, 40))], "which?", said([0, 1], time=False, area=AREA))
    frames, maps = panels(figure)
    assert [layer(frame, 0)[0, 0].tolist() for frame in frames] == [[9, 9, 9], [200, 30, 40]]
    assert [axes.get_title(loc="left") for axes in frames] == ["frame 0", "frame 1"]
    assert maps[0].images[1].get_extent() == [0, 224, 168, 56]
    assert (maps[0].get_xlim(), maps[0].get_ylim()) == ((0, 224), (224, 0))


def test_many_frames_stand_in_rows_of_eight():
    figure = explain_clip(films.gif(20), "which way?", said(range(20)), most=20)
    frames, _ = panels(figure)
    rows = sorted({round(axes.get_position().y0, 3) for axes in frames})
    assert len(rows) == 3
    with Pillow.open(BytesIO(encoded(figure))) as picture:
        assert picture.size[0] == 1920


def test_a_frame_without_a_map_is_drawn_alone():
    answer = said([0, 3])
    del answer["vision"]["frames"][1]["relevance"]
    frames, maps = panels(explain_clip(films.gif(4), "?", answer))
    assert (len(frames), len(maps)) == (2, 1)


@pytest.mark.parametrize(
    ("data", "indices", "message"),
    [(b"no film", [0], "not a video that can be read"), (films.gif(4), [0, 99], "looked at other frames than")],
)
def test_what_cannot_be_decoded_is_told(data, indices, message):
    with pytest.raises(OSError, match=message):
        explain_clip(data, "?", said(indices))
