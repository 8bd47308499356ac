#!/bin/sh
# Remove from an image's environment what nothing there uses, and compile the rest: `slim_environment.sh FOLDER`. Saves a
# third of it.
set -eu
environment=$1
# The hub's client loads tokenizers from the network, which Glimpse never does.
"$environment/bin/pip" uninstall --quiet --yes \
  huggingface-hub hf-xet fsspec filelock tqdm PyYAML httpx2 httpcore2 truststore setuptools pip
find "$environment" -depth -type d \( -name tests -o -name include \) -exec rm -r {} +
# Symbols for debuggers, in extension modules only: libraries in *.libs are patched and would not load any more.
find "$environment" \( -name '*.cpython-*.so' -o -name '*.abi3.so' \) -exec strip --strip-unneeded {} +
# All cores at once, which pip's own compilation does not use. A file for another Python is no error.
"$environment/bin/python" -m compileall -q -j 0 "$environment/lib" || true
