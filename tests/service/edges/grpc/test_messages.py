"""A message becomes Fields, by HTTP's rules."""

import numpy as np
import pytest

from service.core.answer import Delta, Finished, FrameSeen, KeptImage
from service.core.errors import InvalidRequest
from service.core.request import Clip, Exchange, ImageBytes, ImageId, ImageUrl, Priority, Text
from service.core.vision import Relevance
from service.edges.asking import Fields
from service.edges.grpc.messages import (
    MAX_PARTS,
    answer_message,
    chunk_in,
    event_message,
    fields_of,
    kept_message,
    question_in,
)
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.http.schema import MAX_TURNS
from tests.support.calls import question


def fields(message: pb.AnswerRequest, *, stream: bool = False, timeout_s: float | None = None) -> Fields:
    """As a caller's message comes in."""
    return fields_of(question_in(message.SerializeToString()), stream=stream, timeout_s=timeout_s)[0]


def refused(message: pb.AnswerRequest) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        fields(message)
    return caught.value


def test_fields_that_are_left_out_have_the_defaults_of_every_transport():
    assert fields(question("img_1", "what colour?")) == Fields(parts=(ImageId("img_1"), Text("what colour?")))


def test_every_field_is_taken():
    asked = fields(
        question(
            "img_1",
            "?",
            max_tokens=3,
            temperature=0.5,
            top_k=4,
            top_p=0.5,
            seed=0,
            repetition_penalty=1.5,
            stop=[".", "!"],
            detail=pb.DETAIL_HIGH,
            priority=pb.PRIORITY_LOW,
            budget=pb.Budget(vision_tokens=pb.Range(least=64, most=100), visual_tokens=pb.Range(least=32, most=64)),
            explain=True,
            choices=["yes", "no"],
            regex="yes",
            json_schema='{"type": "object"}',
            logprobs=True,
            top_logprobs=3,
            system="be brief",
            video_frames=16,
            video_sampling=pb.VIDEO_SAMPLING_CHANGE,
        ),
        stream=True,
        timeout_s=3.0,
    )
    assert asked == Fields(
        parts=(ImageId("img_1"), Text("?")),
        max_tokens=3,
        temperature=0.5,
        top_k=4,
        top_p=0.5,
        seed=0,
        repetition_penalty=1.5,
        stop=(".", "!"),
        detail="high",
        vision_tokens=(64, 100),
        visual_tokens=(32, 64),
        timeout_s=3.0,
        priority=Priority.LOW,
        stream=True,
        choices=("yes", "no"),
        regex="yes",
        json_schema={"type": "object"},
        log_probs=True,
        top_log_probs=3,
        system="be brief",
        video_frames=16,
        video_sampling="change",
    )


def test_a_schema_is_the_text_of_a_json_object():
    assert refused(question("?", json_schema="{")).message.startswith("json_schema must be JSON text, such as")
    assert refused(question("?", json_schema="[]")).param == "json_schema"
    error = refused(question("?", json_schema=" null "))  # which a form takes for a field that was left out
    assert (error.param, error.message) == ("json_schema", "json_schema is null: send an object, or leave it out")


def test_texts_and_images_keep_their_places_in_questions_and_turns():
    turn = pb.Turn(parts=[pb.Part(image=b"one"), pb.Part(text="which shape?")], answer="a circle")
    url = pb.Part(image_url="https://x/y.png")
    asked = fields(pb.AnswerRequest(parts=[pb.Part(text="and"), pb.Part(image_id=" img_1 "), url], turns=[turn]))
    assert asked.parts == (Text("and"), ImageId("img_1"), ImageUrl("https://x/y.png"))
    assert asked.turns == (Exchange((ImageBytes(b"one"), Text("which shape?")), "a circle"),)


@pytest.mark.parametrize(
    ("part", "clip"),
    [
        (pb.Part(video=b"a film"), Clip(ImageBytes(b"a film"))),
        (pb.Part(video_id=" img_1 "), Clip(ImageId("img_1"))),
        (pb.Part(video_url="https://x/y.mp4"), Clip(ImageUrl("https://x/y.mp4"))),
        (
            pb.Part(
                frames=pb.Frames(frames=[pb.Frame(image=b"one"), pb.Frame(image_id="img_2"), pb.Frame(image_url="u")])
            ),
            Clip((ImageBytes(b"one"), ImageId("img_2"), ImageUrl("u")), frames=3),
        ),
    ],
)
def test_a_video_keeps_its_place(part, clip):
    turn = pb.Turn(parts=[part, pb.Part(text="which shape?")], answer="a circle")
    asked = fields(pb.AnswerRequest(parts=[pb.Part(text="in"), part], turns=[turn]))
    assert asked.parts == (Text("in"), clip)
    assert asked.turns == (Exchange((clip, Text("which shape?")), "a circle"),)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"video_frames": 0}, "video_frames"),
        ({"video_frames": 33}, "video_frames"),
        ({"video_sampling": 9}, "video_sampling"),
        ({"parts": [pb.Part(frames=pb.Frames())]}, "parts.0.frames"),
        ({"parts": [pb.Part(frames=pb.Frames(frames=[pb.Frame(image_id="img_1")] * 33))]}, "parts.0.frames"),
        (
            {"parts": [pb.Part(frames=pb.Frames(frames=[pb.Frame(image=b"x"), pb.Frame()]))]},
            "parts.0.frames.frames.1",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 0.001}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": float("inf")}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["."] * 9}, "stop"),
        ({"detail": 9}, "detail"),
        ({"priority": 9}, "priority"),
        ({"budget": pb.Budget(vision_tokens=pb.Range(least=-1, most=5))}, "budget.vision_tokens.least"),
        ({"turns": [pb.Turn(answer="x")] * (MAX_TURNS + 1)}, "turns"),
        ({"turns": [pb.Turn(parts=[pb.Part()], answer="x")]}, "turns.0.parts.0"),
        ({"parts": [pb.Part(text="?"), pb.Part()]}, "parts.1"),
        ({"parts": [pb.Part(text="?")] * (MAX_PARTS + 1)}, "parts"),
        ({"turns": [pb.Turn(parts=[pb.Part(text="?")], answer="x")]}, "parts"),
    ],
)
def test_a_wrong_value_is_named_by_its_field(given, param):
    error = refused(pb.AnswerRequest(**{"parts": [pb.Part(text="?")]} | given))
    assert error.param == param
    assert param.split(".", maxsplit=1)[0] in error.message


def test_bytes_that_are_no_message_are_the_callers_mistake():
    for parse in (question_in, chunk_in):
        with pytest.raises(InvalidRequest, match=r"is not a glimpse\.v1\.") as caught:
            parse(b"\x0a\xff")
        assert caught.value.code == "invalid_message"
    with pytest.raises(InvalidRequest, match=r"is not a glimpse\.v1\."):
        question_in(b"\x0a\x04\x0a\x02\xff\xff")  # a text that is not UTF-8


def test_an_answer_tells_everything_that_is_known():
    relevance = Relevance(
        np.arange(256, dtype=np.float32).reshape(16, 16) / 255,
        np.stack([np.full((16, 16), value, np.float32) for value in (0.25, 0.5, 0.75)]),
        np.diag([2] * 8).astype(np.int32),
        np.array([0.1, 0.2, 0.3], np.float32),
        (0.0, 1 / 3, 1.0, 2 / 3),
    )
    timing = {"queue": 0.1, "load": 0.2, "vision": 0.3, "first_token": 0.4, "total": 0.5}
    end = Finished("length", ("img_1",), "hit", "high", True, 12, 3, 64, (relevance,), timing, "tiles")
    told = answer_message("vqa_1", "tiny", "a ring", end, explain=True)
    assert (told.id, told.model, told.answer, list(told.image_ids)) == ("vqa_1", "tiny", "a ring", ["img_1"])
    assert told.finish_reason == pb.FINISH_REASON_LENGTH
    assert told.usage == pb.Usage(prompt_tokens=12, completion_tokens=3, image_tokens=64)
    assert told.vision == pb.Vision(
        cache=pb.CACHE_HIT, vision_tokens=184, visual_tokens=64, detail=pb.DETAIL_HIGH, reduced=True, fit=pb.FIT_TILES
    )
    assert told.timing_ms == pb.TimingMs(**timing)
    (where,) = told.relevance
    assert np.array_equal(np.array(where.map, np.float32).reshape(16, 16), relevance.map)
    assert np.array_equal(np.array(where.levels).reshape(8, 8), relevance.levels)
    assert list(where.area) == [0, 0.3333, 1, 0.6667]
    assert (where.propositional[7], where.perspectival[7], where.participatory[7]) == (0.25, 0.5, 0.75)
    assert np.allclose(
        [where.tensions.particularize, where.tensions.explore, where.tensions.diversify], [0.1, 0.2, 0.3]
    )

    assert event_message("vqa_1", "tiny", Delta("a "), explain=True) == pb.AnswerEvent(delta="a ")
    last = event_message("vqa_1", "tiny", end, explain=False).end
    assert (last.answer, len(last.relevance), last.usage) == ("", 0, told.usage)


def test_the_frames_that_were_looked_at_are_told_and_explained_if_asked():
    relevance = Relevance(
        np.full((16, 16), 0.5, np.float32),
        np.zeros((3, 16, 16), np.float32),
        np.zeros((8, 8), np.int32),
        np.array([0.25, 0.5, 0.75], np.float32),
    )
    timing = {"queue": 0.1, "load": 0.2, "vision": 0.3, "first_token": 0.4, "total": 0.5}
    frames = (FrameSeen(0, 0.0, relevance), FrameSeen(7, None, relevance, "img_7"))
    end = Finished("stop", (), "hit", "low", False, 12, 3, 64, (), timing, frames=frames, clip_id="img_1")
    assert answer_message("vqa_1", "tiny", "", end, explain=False).video_id == "img_1"
    plain = answer_message("vqa_1", "tiny", "", end, explain=False).vision.frames
    assert list(plain) == [pb.SeenFrame(index=0, time_s=0.0), pb.SeenFrame(index=7, image_id="img_7")]
    first, second = answer_message("vqa_1", "tiny", "", end, explain=True).vision.frames
    assert (first.index, first.time_s, list(first.relevance.map)) == (0, 0.0, [0.5] * 256)
    assert (list(first.relevance.levels), list(first.relevance.propositional)) == ([0] * 64, [])
    assert first.relevance.tensions == pb.Tensions(particularize=0.25, explore=0.5, diversify=0.75)
    assert (second.HasField("time_s"), second.relevance) == (False, first.relevance)


def test_a_kept_image_has_its_id_size_and_end():
    told = kept_message(KeptImage("img_1", 5, 3, 4, 1795885200.25, 7))
    assert (told.id, told.bytes, told.width, told.height, told.pages) == ("img_1", 5, 3, 4, 7)
    assert told.expires_at.ToMilliseconds() == 1795885200250
