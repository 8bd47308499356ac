"""Where the committed files are."""

import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
SCENES = PROJECT / "build_engines" / "evaluation" / "scenes"
NODE_MODULES = Path(sys.prefix) / "npm" / "node_modules"  # of scripts/npm_packages.py
