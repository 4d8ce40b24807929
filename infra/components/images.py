"""Container images of trainer and server: built and pushed when a registry is configured, else a reference that is there.

Either way the tag is the digest of what went in, so that the same sources have the same name everywhere, `render` and
`up` agree, and a Job re-runs exactly when what it would run has changed.
"""

import hashlib
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pulumi

from infra.components.stage import Image
from infra.spec import Images

ROOT = Path(__file__).parents[2]
Package = Literal["trainer", "serving"]
# fsspec finds the driver of an object store by the URL's scheme; the image holds those that the stack's URLs need.
DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
TAG_CHARS = 16


@dataclass(frozen=True, kw_only=True)
class BuiltImageArgs:
    images: Images
    package: Package
    urls: tuple[str, ...]
    """URLs that the programs of the image open."""
    packages: tuple[str, ...] = ()
    """What the stack asks for besides the package's own dependencies."""


class BuiltImage(pulumi.ComponentResource):
    image: Image

    def __init__(self, name: str, args: BuiltImageArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:Image", name, None, opts)
        drivers = drivers_of(args)
        content = content_digest(args.package, base=args.images.base, drivers=drivers)
        reference = reference_of(args.images, args.package, content=content)
        build = self._build(name, args, drivers, reference) if args.images.registry else None
        # With a reference of the user's own, what it says is all that is known about the content.
        own = not args.images.registry and not reference.endswith(f":{content}")
        self.image = Image(reference=reference, digest=reference if own else content, built_by=build)
        self.register_outputs({"reference": reference})

    def _build(self, name: str, args: BuiltImageArgs, drivers: tuple[str, ...], reference: str) -> pulumi.Resource:
        # 0.2 s of start-up that only stacks which build need.
        import pulumi_docker_build as docker

        root = os.path.relpath(ROOT)
        return docker.Image(
            f"{name}-build",
            context=docker.BuildContextArgs(location=root),
            dockerfile=docker.DockerfileArgs(location=os.path.join(root, args.package, "Dockerfile")),
            build_args={"BASE": args.images.base, "DRIVERS": " ".join(drivers)},
            platforms=[docker.Platform.LINUX_AMD64],
            tags=[reference],
            push=True,
            # A preview shows what changes; it builds nothing.
            build_on_preview=False,
            opts=pulumi.ResourceOptions(parent=self),
        )


def drivers_of(args: BuiltImageArgs) -> tuple[str, ...]:
    """What the image holds besides its package's own dependencies."""
    return tuple(sorted({*storage_drivers(args.urls), *args.packages}))


def storage_drivers(urls: Iterable[str]) -> tuple[str, ...]:
    """Packages that fsspec needs to open `urls`."""
    schemes = {url.split("://", 1)[0] for url in urls if "://" in url}
    return tuple(sorted({DRIVERS[scheme] for scheme in schemes if scheme in DRIVERS}))


def content_digest(package: Package, *, base: str, drivers: tuple[str, ...] = (), root: Path = ROOT) -> str:
    """Hex digest of everything that the image of `package` is made from: sources, Dockerfile, dependencies, pins, base."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = sorted([*project["project"]["optional-dependencies"][package], *drivers])
    parts = [part.encode() for part in (base, *wanted)] + [(root / "constraints.txt").read_bytes()]
    for path in [*sources(root / package), *sources(root / "infra" / "images" / "inside")]:
        parts += [path.relative_to(root).as_posix().encode(), path.read_bytes()]
    sha = hashlib.sha256()
    for part in parts:
        # Length first, so that two parts never read as one.
        sha.update(len(part).to_bytes(8, "big") + part)
    return sha.hexdigest()[:TAG_CHARS]


def sources(directory: Path) -> list[Path]:
    """Files that the image copies, in a fixed order: no caches, nothing hidden."""
    return [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(p.startswith((".", "__pycache__")) for p in path.relative_to(directory).parts)
    ]


def reference_of(images: Images, package: Package, *, content: str) -> str:
    """Reference that pods name. A prebuilt one with a tag or a digest is taken as it stands."""
    if images.registry:
        return f"{images.registry.rstrip('/')}/{package}:{content}"
    prebuilt = images.trainer if package == "trainer" else images.serving
    has_tag = ":" in prebuilt.rsplit("/", 1)[-1]
    return prebuilt if has_tag else f"{prebuilt}:{content}"
