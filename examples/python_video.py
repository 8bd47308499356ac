"""Ask about a short video: python3 -m pip install httpx; python3 examples/python_video.py [URL]"""

import sys
from pathlib import Path

import httpx

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
clip = Path("build_engines/evaluation/clips/clips_000.mp4").read_bytes()
scenes = [Path(f"benchmarks/scenes/new_{number:03}.webp").read_bytes() for number in (3, 7)]

with httpx.Client(base_url=url, timeout=60) as glimpse:
    # A file with its question. The answer says which frames were looked at.
    asked = {"question": "what changed colour?", "video_frames": "4"}
    answer = glimpse.post("/v1/vqa", files={"video": clip}, data=asked).raise_for_status().json()
    print("answer:", answer["answer"])
    print(*[f"{frame['time_s']:.1f} s" for frame in answer["vision"]["frames"]])

    # By its id from now on: its frames are not encoded again.
    asked = {"video": answer["video_id"], "question": "what vanished?", "video_frames": 4}
    answer = glimpse.post("/v1/vqa", json=asked).raise_for_status().json()
    print(answer["vision"]["cache"])

    # Images as the frames of one video, in their order.
    frames = [("frames", scene) for scene in scenes]
    answer = glimpse.post("/v1/vqa", files=frames, data={"question": "what changed colour?"}).raise_for_status().json()
    print(len(answer["vision"]["frames"]), "frames")
