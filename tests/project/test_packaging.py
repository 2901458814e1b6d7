"""The contents of the sdist and of the wheel, and whether the wheel works on its own."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from helpers import engine_tools

ROOT = Path(__file__).resolve().parents[2]
PIN = engine_tools.pin()


def build(kind: str, out: Path) -> Path:
    # not isolated: the wheel takes the engine from the persistent build folder
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
        text=True,
    )
    return next(out.iterdir())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    with tarfile.open(build("sdist", tmp_path_factory.mktemp("sdist"))) as tar:
        return {member.name.split("/", 1)[1] for member in tar if member.isfile()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def test_the_sdist_holds_what_git_tracks_and_the_engines_source(sdist: set[str]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    missing = [name for name in tracked if name not in sdist and (ROOT / name).exists()]
    assert not missing
    # installing from it downloads nothing: the stamp says that the source is complete
    for name in (".imatrix-pin", "LICENSE", "CMakeLists.txt", "include/llama.h", "src/llama.cpp"):
        assert f"vendor/llama.cpp/{name}" in sdist
    assert not [name for name in sdist if name.startswith("vendor/llama.cpp/models")]
    assert not [name for name in sdist if name.startswith(("build/", ".venv"))]


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"imatrix"}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in (
        f"native/engine{suffix}",
        f"native/quantizer{suffix}",
        "native/engine.pyi",
        "native/quantizer.pyi",
        "__init__.pyi",
        "py.typed",
        "data/calibration.txt",
        "data/LICENSE-python.txt",
        "data/held-out.txt",
        "data/held-out-prose.txt",
        "data/tiny-glm4moe-mtp.gguf",
        "data/tiny-glm4moe-mtp.json",
        "lib/LICENSE-llama.cpp.txt",
        "report/templates/report.css",
        "report/templates/report.html",
        "report/templates/sort.js",
    ):
        assert f"imatrix/{name}" in names
    sources = (".pyx", ".pxd", ".cpp", ".h", ".cmake", ".pc", ".a")
    assert not [name for name in names if name.endswith(sources)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF; other platforms name it otherwise")
def test_the_engine_is_found_by_a_relative_rpath(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    libraries = sorted((tmp_path / "imatrix/lib").glob("*.so*"))
    assert {f"libimatrix-{name}.so" for name in ("llama", "ggml", "ggml-base", "ggml-cpu")} <= {
        library.name for library in libraries
    }

    def rpath(library: Path) -> str:
        dynamic = subprocess.run(
            ["readelf", "-d", library], check=True, capture_output=True, text=True
        ).stdout
        return next(
            line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "PATH" in line
        )

    for module in (tmp_path / "imatrix").glob("*.so"):
        assert rpath(module) == "$ORIGIN/lib"
    for library in libraries:
        # ggml-base links no other library of the build, and may have none
        if library.name != "libimatrix-ggml-base.so":
            assert rpath(library) == "$ORIGIN"


def test_the_wheel_works_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import imatrix\n"
        "assert imatrix.__file__.startswith(sys.argv[1]), imatrix.__file__\n"
        "print(imatrix.backends().engine)\n"
        "import imatrix.native.quantizer\n"
    )
    # -S: no .pth files are read, so that an editable install of this tree has no effect
    result = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path), sysconfig.get_paths()["purelib"]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("llama.cpp ")


def test_importing_an_unbuilt_tree_says_what_to_run(tmp_path: Path) -> None:
    package = tmp_path / "imatrix"
    for source in (ROOT / "src/imatrix").rglob("*.py"):
        target = package / source.relative_to(ROOT / "src/imatrix")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import imatrix\n"
        "print(len(imatrix.ImportanceMatrix({})))\n"  # the part without native code works
        "imatrix.Collector\n"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path), sysconfig.get_paths()["purelib"]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert result.stdout == "0\n", result.stderr
    assert (
        "ImportError: imatrix.Collector needs the native part, which is not built here"
        in result.stderr
    )
    assert "pip install ." in result.stderr
    assert "make dev" in result.stderr


class TestFetch:
    """vendor/fetch.py, run as the build runs it, with caches of its own."""

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "vendor/fetch.py"), *args],
            capture_output=True,
            text=True,
            env={**os.environ, **env},
        )

    def test_a_damaged_archive_is_refused(self, tmp_path: Path) -> None:
        archive = tmp_path / PIN["archive"]
        archive.write_bytes(b"not the release")
        result = self.run("--target", str(tmp_path / "out"), IMATRIX_CACHE=str(tmp_path))
        assert result.returncode == 1
        assert f"expected {PIN['sha256']}" in result.stderr
        assert "delete it and build again" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_without_an_index_it_says_what_to_do(self, tmp_path: Path) -> None:
        result = self.run(
            "--target", str(tmp_path / "out"), IMATRIX_CACHE=str(tmp_path / "cache"),
            PIP_NO_INDEX="1", PIP_FIND_LINKS="",
        )  # fmt: skip
        assert result.returncode == 1
        assert (
            f"could not download the source of {PIN['package']}=={PIN['version']}" in result.stderr
        )
        assert "IMATRIX_LLAMA_CPP" in result.stderr

    def test_what_another_archive_changes_is_built_again(self, tmp_path: Path) -> None:
        """It holds for any package and any folder in it. A build compares times, and the archive of
        a newer engine may hold files that are older than the objects made from the previous
        engine."""
        fetch = self.module()
        old = {"CMakeLists.txt": b"", "src/same.cpp": b"a", "src/other.cpp": b"b"}
        new = {"CMakeLists.txt": b"", "src/same.cpp": b"a", "src/other.cpp": b"c"}
        target = tmp_path / "engine"
        keep = {"keep": ["CMakeLists.txt", "src"], "keep_for_tests": [], "sha256": ""}
        fetch.unpack(self.archive(tmp_path / "1.tar.gz", "a-1.0/vendor/llama", old),
                     {"folder": "a-1.0/vendor/llama", **keep}, target)  # fmt: skip
        for path in (target / "src").iterdir():
            os.utime(path, (1000, 1000))
        fetch.unpack(self.archive(tmp_path / "2.tar.gz", "b-2/third_party/llama.cpp", new),
                     {"folder": "b-2/third_party/llama.cpp", **keep}, target)  # fmt: skip
        assert (target / "src/other.cpp").read_bytes() == b"c"
        assert (target / "src/other.cpp").stat().st_mtime > 1e9  # of now, not the archive's 0
        assert (target / "src/same.cpp").stat().st_mtime == 1000

    @staticmethod
    def module() -> ModuleType:
        spec = importlib.util.spec_from_file_location("fetch", ROOT / "vendor" / "fetch.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @staticmethod
    def archive(path: Path, folder: str, files: dict[str, bytes]) -> Path:
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(f"{folder}/{name}")  # its time is 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path

    def test_a_complete_source_is_not_fetched_again(self, tmp_path: Path) -> None:
        # the tree that the build left; the cache cannot be used, which shows that nothing is looked
        # up
        result = self.run(IMATRIX_CACHE=str(tmp_path / "nowhere"), PIP_NO_INDEX="1")
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == str(ROOT / "vendor" / "llama.cpp")
        assert not (tmp_path / "nowhere").exists()
