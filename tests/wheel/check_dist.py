#!/usr/bin/env python3
"""Read a release's files, and say what is wrong with them: what lies in the wheels and the sdist,
instruction sets, where libraries look for each other, licences, versions, sizes.

    python tests/wheel/check_dist.py dist [--released] [--tag vX.Y.Z]

--released: CHANGELOG.md must have a dated entry of the version, not one that is called unreleased.
--tag: of this version.

Of Linux wheels it takes auditwheel's word for which libraries of the system they may use; the
dependency group "release" has what this script needs. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import email.parser
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 25 * 1000 * 1000  # of a wheel
MOST_CUDA_BYTES = (
    100 * 1024 * 1024
)  # what the package index takes of one file unless asked for more
# Which variants of the CPU's backend a wheel has to have: of those that its compiler can make, these
# are what a common processor needs.
VARIANTS = {
    "manylinux_x86_64": {
        "x64", "sse42", "sandybridge", "ivybridge", "piledriver", "haswell", "alderlake",
        "skylakex", "cannonlake", "cascadelake", "icelake", "cooperlake", "zen4",
    },
    "manylinux_aarch64": {"armv8.0_1", "armv8.2_1", "armv8.2_2", "armv8.2_3", "armv8.6_1"},
    "macosx_arm64": {"apple_m1", "apple_m2_m3"},
    "win_amd64": {"x64", "sse42", "sandybridge", "haswell", "skylakex", "icelake", "alderlake"},
}  # fmt: skip
# Vector registers beyond those that every x86-64 processor has.
WIDE = re.compile(r"%[yz]mm\d")
# Without a wide register: the variants that may have none, and the libraries that are not chosen by
# the processor. The extension module engine is left out: its row kernels are chosen at run time.
NARROW = ("libimatrix-", "libggml-cpu-x64", "libggml-cpu-sse42", "libggml-rpc")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheels and the sdist are")
    parser.add_argument("--released", action="store_true", help="CHANGELOG has a dated entry")
    parser.add_argument("--tag", help="the tag that the release is made of")
    args = parser.parse_args()
    wheels = sorted(args.folder.glob("*.whl"))
    sdists = sorted(args.folder.glob("*.tar.gz"))
    wrong: list[str] = []
    if not wheels:
        wrong.append(f"{args.folder} holds no wheel")
    if len(sdists) != 1:
        wrong.append(f"{args.folder} holds {len(sdists)} sdists, expected 1")
    wrong += check_versions([*wheels, *sdists], args.released)
    if args.tag not in (None, f"v{version_of_tree()}"):
        wrong.append(f"the tag {args.tag} is not v{version_of_tree()}, the version of the tree")
    for wheel in wheels:
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        check = check_cuda if wheel.name.startswith("imatrix_cuda-") else check_wheel
        wrong += [f"{wheel.name}: {what}" for what in check(wheel)]
    for sdist in sdists:
        print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB")
        wrong += [f"{sdist.name}: {what}" for what in check_sdist(sdist)]
    for what in wrong:
        print(f"WRONG: {what}", file=sys.stderr)
    print("all is as it should be" if not wrong else f"{len(wrong)} thing(s) wrong")
    return 1 if wrong else 0


# --- versions --------------------------------------------------------------------------------------


def version_of_tree() -> str:
    found = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "src/imatrix/_version.py").read_text("utf-8"), re.M
    )
    assert found is not None
    return found[1]


def check_versions(files: list[Path], released: bool) -> Iterator[str]:
    """The tree, the names of the files and CHANGELOG say one version."""
    version = version_of_tree()
    print(f"version {version}")
    for file in files:
        starts = (
            (f"imatrix-{version}-", f"imatrix_cuda-{version}-")
            if file.suffix == ".whl"
            else (f"imatrix-{version}.tar.gz",)
        )
        if not file.name.startswith(starts):
            yield f"{file.name} is not of version {version} (src/imatrix/_version.py)"
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    entry = next((h for h in headings if h.split()[0] == version), None)
    if entry is None:
        yield f"CHANGELOG.md has no entry of {version}; its newest is {headings[0]!r}"
    elif released and not re.search(r"\d{4}-\d\d-\d\d", entry):
        yield f"CHANGELOG.md's entry {entry!r} has no date"


# --- wheels ----------------------------------------------------------------------------------------


def check_wheel(path: Path) -> Iterator[str]:
    if path.stat().st_size > MOST_BYTES:
        yield f"it has {path.stat().st_size:,} bytes, at most {MOST_BYTES:,} are meant"
    tag = path.stem.split("-")[-1]
    platform = re.sub(r"(manylinux|macosx)(_\d+_\d+|\d+)?.*_(x86_64|aarch64|arm64)$", r"\1_\3", tag)
    if platform not in VARIANTS:
        yield f"its platform {tag} is none that is released: {', '.join(VARIANTS)}"
        return
    with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory() as folder:
        file.extractall(folder)
        root = Path(folder)
        names = [name for name in file.namelist() if not name.endswith("/")]
        yield from check_names(names)
        yield from check_metadata(root, names)
        yield from check_variants(root, VARIANTS[platform])
        if platform.startswith("manylinux"):
            yield from check_elf(root)
            yield from check_auditwheel(path, tag)


def check_names(names: list[str]) -> Iterator[str]:
    tops = {name.split("/")[0] for name in names}
    stray = {top for top in tops if top not in ("imatrix", "imatrix.libs")
             and not top.endswith(".dist-info")}  # fmt: skip
    if stray:
        yield f"stray folders: {', '.join(sorted(stray))}"
    built_from = (".pyx", ".pxd", ".cpp", ".h", ".cmake", ".pc", ".a", ".o", ".lib")
    left = [name for name in names if name.endswith(built_from) or "__pycache__" in name]
    if left:
        yield f"files that only the build needs: {', '.join(left[:5])}"


def check_metadata(root: Path, names: list[str]) -> Iterator[str]:
    info = next(root.glob("*.dist-info"))
    metadata = email.parser.Parser().parsestr((info / "METADATA").read_text("utf-8"))
    if metadata["Version"] != version_of_tree():
        yield f"its metadata say version {metadata['Version']}"
    licences = {PurePosixPath(name).name for name in names if "LICENSE" in name}
    needed = {"LICENSE", "LICENSE-python.txt", "LICENSE-llama.cpp.txt"}
    bundled = {PurePosixPath(name).name for name in names if name.startswith("imatrix.libs/")}
    for library in sorted(bundled):
        if library.startswith("libgomp"):
            needed.add("LICENSE-libgomp.txt")
        else:
            yield f"{library} is bundled, and nothing here knows its licence"
    if missing := needed - licences:
        yield f"licences that are missing: {', '.join(sorted(missing))}"


def check_variants(root: Path, expected: set[str]) -> Iterator[str]:
    lib = root / "imatrix/lib"
    found = {m[1] for path in lib.iterdir()
             if (m := re.fullmatch(r"(?:lib)?ggml-cpu-(.+)\.(?:so|dll)", path.name))}  # fmt: skip
    print(f"  variants of the CPU's backend: {', '.join(sorted(found))}")
    if missing := expected - found:
        yield f"variants that are missing: {', '.join(sorted(missing))}"
    linked = [path.name for path in lib.iterdir() if "imatrix-ggml-cpu" in path.name]
    if linked:
        yield f"{linked[0]} is linked: the wheel was built without IMATRIX_PORTABLE"


def elf_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def dynamic(path: Path) -> tuple[list[str], list[str]]:
    """Which libraries a file needs, and in which folders it looks for them."""
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile

    needed: list[str] = []
    places: list[str] = []
    for section in ELFFile(io.BytesIO(path.read_bytes())).iter_sections():
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                if tag.entry.d_tag == "DT_NEEDED":
                    needed.append(tag.needed)
                elif tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                    places += (tag.rpath if tag.entry.d_tag == "DT_RPATH" else tag.runpath).split(
                        ":"
                    )
    return needed, places


def check_elf(root: Path) -> Iterator[str]:
    """Where libraries look for each other, and the instructions of those that any processor runs."""
    from elftools.elf.elffile import ELFFile

    files = list(elf_files(root))
    for path in files:
        elf = ELFFile(io.BytesIO(path.read_bytes()))
        needed, places = dynamic(path)
        for place in places:
            inside = (path.parent / place.replace("$ORIGIN", ".")).resolve()
            if not place.startswith("$ORIGIN") or root.resolve() not in inside.parents:
                yield f"{path.name} looks for libraries in {place}"
        for name in needed:
            if any(other.name == name for other in files) and not any(
                (path.parent / place.replace("$ORIGIN", ".") / name).exists() for place in places
            ):
                yield f"{path.name} does not find {name}, which is in the wheel"
        if elf.get_machine_arch() == "x64" and path.name.startswith(NARROW):
            yield from check_instructions(path)


def check_instructions(path: Path) -> Iterator[str]:
    if shutil.which("objdump") is None:
        yield "objdump (binutils) is needed to see which instructions are in it"
        return
    shown = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], check=True, capture_output=True, text=True
    ).stdout
    wide = len(WIDE.findall(shown))
    if wide:
        yield f"{path.name} has {wide} uses of AVX registers, and any x86-64 processor has to run it"


def check_auditwheel(path: Path, tag: str) -> Iterator[str]:
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", path], capture_output=True, text=True
    )
    told = " ".join(shown.stdout.split())
    if shown.returncode != 0 or "manylinux" not in told:
        yield f"auditwheel show: {told or shown.stderr.strip()}"
        return
    print("  " + told.split("The wheel references")[0].strip())
    if not any(part in told for part in tag.split(".")):
        yield f"auditwheel finds another platform than the name says: {told}"


# --- the wheel of imatrix-cuda ---------------------------------------------------------------------

# What its module takes from elsewhere: NVIDIA's driver, NVIDIA's packages, imatrix's own wheel.
CUDA_NEEDS = {"libcuda.so.1", "libcudart.so.13", "libcublas.so.13", "libimatrix-ggml-base.so"}
CUDA_PLACES = {"$ORIGIN/../../imatrix/lib", "$ORIGIN/../../nvidia/cu13/lib"}


def check_cuda(path: Path) -> Iterator[str]:
    if path.stat().st_size > MOST_CUDA_BYTES:
        yield f"it has {path.stat().st_size:,} bytes, and the index takes {MOST_CUDA_BYTES:,}"
    with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory() as folder:
        file.extractall(folder)
        root = Path(folder)
        version = version_of_tree()
        info = f"imatrix_cuda-{version}.dist-info"
        expected = {
            "imatrix_cuda/__init__.py",
            "imatrix_cuda/lib/libggml-cuda.so",
            "imatrix_cuda/lib/LICENSE-llama.cpp.txt",
        }
        found = {name for name in file.namelist() if not name.startswith(info)}
        if found - {name for name in found if name.endswith("/")} != expected:
            yield f"it holds {', '.join(sorted(found))}"
            return
        metadata = email.parser.Parser().parsestr((root / info / "METADATA").read_text("utf-8"))
        requires = metadata.get_all("Requires-Dist") or []
        if f"imatrix=={version}" not in requires:
            yield f"it does not ask for imatrix=={version}: {', '.join(requires)}"
        needed, places = dynamic(root / "imatrix_cuda/lib/libggml-cuda.so")
        if missing := CUDA_NEEDS - set(needed):
            yield f"it was not linked to {', '.join(sorted(missing))}"
        if set(places) != CUDA_PLACES:
            yield f"it looks for libraries in {', '.join(places)}"
        yield from check_auditwheel(path, path.stem.split("-")[-1])


# --- the sdist -------------------------------------------------------------------------------------


def check_sdist(path: Path) -> Iterator[str]:
    with tarfile.open(path) as tar:
        names = {member.name.split("/", 1)[1] for member in tar if member.isfile()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    missing = [name for name in tracked if name and name not in names and (ROOT / name).exists()]
    if missing:
        yield f"tracked files that are missing: {', '.join(missing[:5])}"
    # what makes it install without a network
    for name in (".imatrix-pin", "LICENSE", "CMakeLists.txt", "src/llama.cpp"):
        if f"vendor/llama.cpp/{name}" not in names:
            yield f"vendor/llama.cpp/{name} is missing: the engine's source would be downloaded"
    known = {*tracked, "PKG-INFO"}
    stray = [n for n in names if n not in known and not n.startswith("vendor/llama.cpp/")]
    if stray:
        yield f"files that git does not track: {', '.join(sorted(stray)[:5])}"


if __name__ == "__main__":
    sys.exit(main())
