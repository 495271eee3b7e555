#!/usr/bin/env bash
# Install pyproject.toml's requirements and those of its EXTRAs into a base image's Python: for the Dockerfiles.
#   install-requirements.sh EXTRA...          (with pyproject.toml beside it)
#
# Under the base image's own constraint file (NVIDIA's sets PIP_CONSTRAINT), and with torch and torchvision held where
# they are: the base's were built together, and pip stops rather than replace them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python3 - "$@" <<'PY'
import sys, tomllib
from importlib.metadata import version

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = project["dependencies"] + [line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]]
with open("wanted.txt", "w") as file:
    print(*wanted, sep="\n", file=file)
with open("held.txt", "w") as file:
    print(*(f"{name}=={version(name)}" for name in ("torch", "torchvision")), sep="\n", file=file)
PY

# NVIDIA's images have an OpenCV of their own. opencv-python-headless would be unpacked into its folder, and neither work.
if folder=$(python3 -c "import importlib.util as u; print(*u.find_spec('cv2').submodule_search_locations)" 2>/dev/null); then
  python3 -m pip uninstall --yes opencv opencv-python opencv-contrib-python
  rm -rf "$folder"
fi

python3 -m pip install --no-cache-dir -r wanted.txt -c held.txt
