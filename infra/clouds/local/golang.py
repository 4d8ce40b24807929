"""Programs of Kubernetes, built from pinned Go modules into the cache, once for each content of `go.mod` and `go.sum`."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.clouds.local import go, less
from infra.clouds.local.debian import Say
from infra.clouds.local.making import making, tied
from infra.clouds.local.places import KUBERNETES, ClusterError, Unable, digest_of
from infra.clouds.local.shell import run

TOOLS = Path(__file__).parent / "tools"
FLAGS = {
    "kubernetes": f"-X k8s.io/component-base/version.gitVersion={KUBERNETES} "
    "-X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36",
}
# Prometheus finds what it scrapes by Kubernetes alone; all that it can ask would be the clouds' SDKs too.
TAGS = {"prometheus": "remove_all_sd,enable_kubernetes_sd"}
MODULES = ("kubernetes", "coredns", "metrics-server")

# Between these a compiler that collects nothing has room for every package of Kubernetes.
LEAST_OF_COMPILER_BYTES, MOST_OF_COMPILER_BYTES = 1 << 30, 2 << 30


@dataclass(frozen=True)
class Built:
    folders: dict[str, Path]
    """Module → folder of its programs."""

    def program(self, name: str) -> Path:
        return next(folder / name for folder in self.folders.values() if (folder / name).exists())


def build(cache: Path, modules: Sequence[str] = MODULES, *, say: Say) -> Built:
    """Have the programs of `modules`, each from the cache or built. Raises `Unable`, `ClusterError`."""
    folders = {module: cache / f"{module}-{_digest(TOOLS / module)}" for module in modules}
    to_build = [module for module, folder in folders.items() if not folder.exists()]
    if not to_build:
        return Built(folders)
    compiler = go.program(cache, say=say)
    for index, module in enumerate(to_build, start=1):
        say(f"building {module} from its Go modules, {index} of {len(to_build)} (once)")
        started = time.monotonic()
        _build(module, folders[module], compiler=compiler)
        say(f"built {module} in {time.monotonic() - started:.0f} s")
    return Built(folders)


def module_folder(module: str, *, tool: str, compiler: Path) -> Path:
    """Folder of a module's sources in Go's module cache, of the version that the go.mod of tools/`tool` says."""
    done = run(compiler, "mod", "download", "-json", module, cwd=TOOLS / tool, env=_env())
    if done.returncode:
        raise ClusterError(f"go cannot fetch {module}: {(done.stdout or done.stderr).strip()[-400:]}")
    return Path(json.loads(done.stdout)["Dir"])


def _build(module: str, folder: Path, *, compiler: Path) -> None:
    with making(folder) as part:
        if part is None:  # another build of the same was first
            return
        sources = TOOLS / module
        if module in less.LESS:
            sources = part / "sources"
            whole = module_folder(less.LESS[module].module, tool=module, compiler=compiler)
            less.make(less.LESS[module], whole, tool=TOOLS / module, folder=sources)
        # Every program that go.mod declares as a tool, where the module is no program itself.
        what = "." if (sources / "main.go").exists() else "tool"
        # Nothing is compiled for a debugger that the linker would only leave out.
        flags = ["-trimpath", "-gcflags=all=-dwarf=false", f"-ldflags=-s -w {FLAGS.get(module, '')}", "-o", f"{part}/"]
        tags = ["-tags", TAGS[module]] if module in TAGS else []
        _fetch(module, *tags, what, sources=sources, compiler=compiler)
        environment = _env() | _roomy() | {"GOTMPDIR": str(part)}
        done = run(*tied(compiler, "build", *flags, *tags, what), cwd=sources, env=environment)
        if done.returncode:
            raise ClusterError(f"go cannot build {module}: {done.stderr.strip()[-800:]}")
        shutil.rmtree(part / "sources", ignore_errors=True)


def _fetch(module: str, *words: str, sources: Path, compiler: Path) -> None:
    """Have the modules of all that is to be compiled. Raises `Unable` where they cannot be had."""
    done = run(*tied(compiler, "list", "-deps", *words), cwd=sources, env=_env())
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.startswith("go: downloading ")]
        why = said[0] if said else "no reason given"
        raise Unable(
            f"Go's modules of {module} cannot be fetched ({why}). Fix: a network where they can be had, or GOPROXY of your own"
        )


def _env() -> dict[str, str]:
    # Static, so that a program is also an image; as it is pinned, whatever the user's own Go settings are.
    return os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false", "GOWORK": "off"}


def _roomy() -> dict[str, str]:
    """Where there is memory for it, compilers collect no garbage, which is a quarter of what they do."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # `go build` runs a compiler for each processor; half of the memory is others'.
    each_bytes = min(memory_bytes // 2 // (os.cpu_count() or 1), MOST_OF_COMPILER_BYTES)
    return {"GOGC": "off", "GOMEMLIMIT": str(each_bytes)} if each_bytes >= LEAST_OF_COMPILER_BYTES else {}


def _digest(folder: Path) -> str:
    flags = (FLAGS.get(folder.name, "") + TAGS.get(folder.name, "")).encode()
    how = [flags, Path(less.__file__).read_bytes()] if folder.name in less.LESS else [flags]
    return digest_of([*how, *(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())])
