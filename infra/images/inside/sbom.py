"""Inside an image's build: what the image holds, as a CycloneDX document on stdout. The same bytes for the same content.

https://cyclonedx.org/docs/1.5/json/; packages are named by package URL, as scanners of vulnerabilities want them.
"""

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path


def python_packages(folders: list[str]) -> list[dict[str, str]]:
    found = {one.metadata["Name"].lower(): one.version for one in distributions(path=folders)}
    return [_component(name, version, f"pkg:pypi/{name}@{version}") for name, version in sorted(found.items())]


def debian_packages() -> list[dict[str, str]]:
    """None where the base image is no Debian."""
    if not Path("/var/lib/dpkg/status").exists():
        return []
    command = ["dpkg-query", "--show", "--showformat=${Package} ${Version}\\n"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()  # noqa: S603
    pairs = [line.split() for line in sorted(lines)]
    return [_component(name, version, f"pkg:deb/debian/{name}@{version}") for name, version in pairs]


def _component(name: str, version: str, purl: str) -> dict[str, str]:
    return {"type": "library", "name": name, "version": version, "purl": purl}


if __name__ == "__main__":
    components = debian_packages() + python_packages(sys.argv[1:])
    document = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}
    print(json.dumps(document, indent=1))
