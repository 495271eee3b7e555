#!/usr/bin/env bash
# Install pyproject.toml's requirements and those of its EXTRAs into a base image's Python: for the Dockerfiles.
#   install-requirements.sh EXTRA...          (with pyproject.toml and constraints.txt beside it)
#
# At the versions of constraints.txt, but what the base image pins itself (NVIDIA's sets PIP_CONSTRAINT), torch,
# torchvision and what these two need stay as they are: the base's were built together, and pip stops rather than replace
# torch. A package that cannot be had at its pinned version beside those is installed at another, and named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

cat >pins.py <<'PY'
"""`pins.py write EXTRA...` writes wanted.txt, held.txt and pins.txt; `pins.py relax` takes out of pins.txt what the
base image rules out."""
import json, os, re, subprocess, sys, tomllib
from importlib.metadata import PackageNotFoundError, distribution, version
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name


def lines(file):
    with open(file) as text:
        return [line.partition("#")[0].strip() for line in text if re.match(r"[A-Za-z0-9]", line)]


def applies(requirement, extras=()):
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def versions(file):
    """name -> version of each `name==version` that applies here; None where a line says it in another way."""
    found = {}
    for line in lines(file):
        name = canonicalize_name(re.match(r"[\w.-]+", line)[0])
        match = re.fullmatch(r"[\w.\[\]-]+ *===?([\w.+!-]+) *(;.*)?", line)
        if not match or applies(Requirement(line)):
            found[name] = match and match[1]
    return found


def base():
    """name -> version (None: unknown) of all that has to stay as it is."""
    found, seen, waiting = {}, set(), [Requirement("torch"), Requirement("torchvision")]
    while waiting:
        need = waiting.pop()
        key = canonicalize_name(need.name), frozenset(need.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            package = distribution(need.name)
        except PackageNotFoundError:
            continue
        found[key[0]] = package.version
        waiting += [r for r in map(Requirement, package.requires or ()) if applies(r, need.extras)]
    for file in os.environ.get("PIP_CONSTRAINT", "").split():
        found |= versions(file) if os.path.exists(file) else {}
    return found


if sys.argv[1] == "write":
    with open("pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    wanted = project["dependencies"] + [line for e in sys.argv[2:] for line in project["optional-dependencies"][e]]
    held = base()
    files = {
        "wanted.txt": wanted,
        "held.txt": [f"{name}=={version(name)}" for name in ("torch", "torchvision")],
        "pins.txt": [f"{name}=={v}" for name, v in versions("constraints.txt").items() if name not in held],
    }
else:
    held, pins = base(), versions("pins.txt")
    # What is needed at all, in any version; then what each of these needs in its pinned one.
    dry = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--quiet", "--dry-run", "--report"]
    subprocess.run([*dry, "plan.json", "-r", "wanted.txt", "-c", "held.txt"], check=True)
    with open("plan.json") as file:
        needed = {canonicalize_name(item["metadata"]["name"]) for item in json.load(file)["install"]}
    pinned = [f"{name}=={pins[name]}" for name in sorted(needed & set(pins))]
    subprocess.run([*dry, "pinned.json", "--no-deps", "--ignore-installed", *pinned], check=True)
    with open("pinned.json") as file:
        items = [item["metadata"] for item in json.load(file)["install"]]
    for item in items:
        for need in filter(applies, map(Requirement, item.get("requires_dist", ()))):
            there = held.get(canonicalize_name(need.name))
            if there and not need.specifier.contains(there, prereleases=True):
                print(f"note: {item['name']} is not installed as pinned: {item['version']} needs {need.name}"
                      f"{need.specifier}, the base image has {there}")
                pins.pop(canonicalize_name(item["name"]), None)
    files = {"pins.txt": [f"{name}=={v}" for name, v in pins.items()]}
for name, content in files.items():
    with open(name, "w") as file:
        print(*content, sep="\n", file=file)
PY
python3 pins.py write "$@"

# NVIDIA's images have an OpenCV of their own. opencv-python-headless would be unpacked into its folder, and neither work.
if folder=$(python3 -c "import importlib.util as u; print(*u.find_spec('cv2').submodule_search_locations)" 2>/dev/null); then
  python3 -m pip uninstall --yes opencv opencv-python opencv-contrib-python
  rm -rf "$folder"
fi

install=(python3 -m pip install --no-cache-dir -r wanted.txt -c held.txt -c pins.txt)
if ! "${install[@]}"; then
  echo "install-requirements: not with all pins of constraints.txt; looking for those that the base image rules out"
  python3 pins.py relax
  "${install[@]}"
fi
