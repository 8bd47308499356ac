#!/usr/bin/env python3
"""Makes .venv-modelopt, once: NVIDIA's quantiser, which `glimpse build --precision fp8` calls as a program of its own.

Its pinned onnx and onnxruntime are older than those of .venv, so the two cannot share an environment. Takes 1.5 GB.
"""

import hashlib
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv-modelopt")
TORCH = "torch==2.13.0"
REQUIREMENTS = os.path.join(ROOT, "scripts", "modelopt.txt")


def main():
    with open(REQUIREMENTS, "rb") as source:
        wanted = hashlib.sha256(sys.version.encode() + source.read()).hexdigest()
    mark = os.path.join(VENV, ".ready")
    if os.path.exists(mark):
        with open(mark, encoding="ascii") as done:
            if done.read() == wanted:
                return
    print("Setting up modelopt in .venv-modelopt (once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    python = os.path.join(VENV, "bin", "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, TORCH], check=True)
    # The rest is named with its version; modelopt's own wishes are a GPU's packages.
    subprocess.run([*pip, "--no-deps", "-r", REQUIREMENTS], check=True)
    subprocess.run([python, "-c", "import modelopt.onnx.quantization"], check=True)
    with open(mark, "w", encoding="ascii") as done:
        done.write(wanted)


if __name__ == "__main__":
    main()
