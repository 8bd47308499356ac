"""Where the committed files are."""

from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
SCENES = PROJECT / "build_engines" / "evaluation" / "scenes"
