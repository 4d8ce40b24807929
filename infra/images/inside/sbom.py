"""Inside an image's build: what the image holds, as a CycloneDX document on stdout. The same bytes for the same content.

    python -m inside.sbom ROOT [--folders FOLDER…] [--others PURL…]

The packages of Debian whose files are in ROOT (see `root`), Python's packages in each FOLDER, and what else is named by its package
URL. https://cyclonedx.org/docs/1.5/json/; scanners of vulnerabilities know packages by their URLs.
"""

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path

INFO = Path("/var/lib/dpkg/info")


def python_packages(folders: list[str]) -> list[str]:
    found = {one.metadata["Name"].lower(): one.version for one in distributions(path=folders)}
    return [f"pkg:pypi/{name}@{version}" for name, version in sorted(found.items())]


def debian_packages(root: Path) -> list[str]:
    """None where the base image is no Debian."""
    if not INFO.exists():
        return []
    command = ["dpkg-query", "--show", "--showformat=${binary:Package} ${Package} ${Version}\\n"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()  # noqa: S603
    found: set[str] = set()
    for entry, name, version in (line.split() for line in lines):
        listed = next((path for path in (INFO / f"{entry}.list", INFO / f"{name}.list") if path.exists()), None)
        if listed and any(_is_file_of(root, line) for line in listed.read_text().splitlines()):
            found.add(f"pkg:deb/debian/{name}@{version}")
    return sorted(found)


def interpreter(root: Path) -> list[str]:
    """Python, where it is no package of Debian's."""
    ours = any(root.glob("usr/local/bin/python3*"))
    return [f"pkg:generic/python@{platform.python_version()}"] if ours else []


def _is_file_of(root: Path, listed: str) -> bool:
    """Debian lists some files by a folder that is a link now (`/lib`)."""
    path = Path(os.path.realpath(os.path.dirname(listed)), os.path.basename(listed))
    there = root / path.relative_to("/")
    return there.is_file() and not there.is_symlink()


def _component(purl: str) -> dict[str, str]:
    name, version = purl.rsplit("/", 1)[-1].split("@")
    return {"type": "library", "name": name, "version": version, "purl": purl}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--folders", nargs="*", default=[])
    parser.add_argument("--others", nargs="*", default=[])
    args = parser.parse_args()
    purls = [*args.others, *interpreter(args.root), *debian_packages(args.root), *python_packages(args.folders)]
    components = [_component(purl) for purl in purls]
    print(
        json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}, indent=1)
    )
