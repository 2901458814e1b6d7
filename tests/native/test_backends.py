"""The engine's backends: where they are loaded from, what is said of those that cannot be, other
copies of ggml in the process, and the row kernel that IMATRIX_KERNEL names.

Each case is a process of its own, with a copy of the package that nothing else of this tree is
imported with. What only a build with modules for the CPU can show is in tests/wheel.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.running import NO_GPU, trained_models

import imatrix
from imatrix.native import engine

Collect = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]
NATIVE = Path(engine.__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="changes names in ELF files")

# A run of a session: what it counted of one chunk.
COLLECT = """
import imatrix
with imatrix.Collector(MODEL, n_ctx=64, isolate=False) as collector:
    matrix = collector.run("one two three four five six seven " * 40, max_chunks=1)
print(len(matrix), "weights")
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package, its libraries included, as a wheel would lay it."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.cpp", "*.pyx", "*.pxd")
    copy = tmp_path / "imatrix"
    shutil.copytree(ROOT / "src/imatrix", copy, ignore=ignored)
    shutil.copytree(NATIVE.parent / "lib", copy / "lib")
    bundled = NATIVE.parents[1] / "imatrix.libs"  # a repaired wheel's
    if bundled.is_dir():
        shutil.copytree(bundled, tmp_path / "imatrix.libs")
    for module in NATIVE.glob("*.so"):
        shutil.copy(module, copy / "native")
    return tmp_path


def run(folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # -S: no .pth files are read, so that an editable install of this tree has no effect
    paths = [str(folder), sysconfig.get_paths()["purelib"]]
    return subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths}\n{code}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **NO_GPU, **variables},
        timeout=120,
    )


def version(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    code = "import imatrix.cli\nraise SystemExit(imatrix.cli.main(['--version']))"
    return run(folder, code, **variables)


def renamed(library: Path, new: Path, *names: tuple[str, str]) -> None:
    """Write a library with other names in it: its own and those that it needs. A name lies in the
    file with a NUL behind it, so a shorter one fits in its place."""
    content = library.read_bytes()
    for old, other in names:
        assert len(other) <= len(old)
        assert old.encode() + b"\0" in content
        content = content.replace(
            old.encode() + b"\0", other.encode().ljust(len(old), b"\0") + b"\0"
        )
    new.write_bytes(content)


class TestModules:
    def test_one_that_needs_a_missing_library_is_listed_with_it(self, package: Path) -> None:
        lib = package / "imatrix/lib"
        renamed(
            lib / "libimatrix-ggml.so",
            lib / "libggml-cuda.so",
            ("libimatrix-ggml-base.so", "libcuda-of-a-driver.so"),
        )
        done = version(package)
        assert done.returncode == 0, done.stderr
        assert (
            "unusable    libggml-cuda.so: libcuda-of-a-driver.so: cannot open shared object file"
            in done.stdout
        )
        # the engine's own backends are there as before
        assert "device      CPU: " in done.stdout
        # and whoever collects is told as well
        done = run(package, COLLECT.replace("MODEL", repr(str(trained_models()[0]))))
        assert done.returncode == 0, done.stderr
        assert done.stdout == "32 weights\n"
        assert "the backend libggml-cuda.so cannot be used here: libcuda-of-a" in done.stderr

    def test_a_damaged_one_is_listed(self, package: Path) -> None:
        (package / "imatrix/lib/libggml-vulkan.so").write_bytes(b"\x7fELF of no use")
        done = version(package)
        assert done.returncode == 0, done.stderr
        assert "unusable    libggml-vulkan.so: " in done.stdout
        assert "file too short" in done.stdout

    def test_none_is_taken_from_the_current_folder(self, package: Path) -> None:
        """The engine by itself looks there and beside the interpreter: who starts imatrix in
        llama.cpp's own build folder would get modules of another engine."""
        (package / "libggml-vulkan.so").write_bytes(b"\x7fELF of no use")
        done = version(package)
        assert done.returncode == 0, done.stderr
        assert "vulkan" not in done.stdout + done.stderr


class TestTwoDevices:
    """A GPU of two that cannot be used (tests/native/two_devices.cpp)."""

    @pytest.fixture
    def collect(self, package: Path, tmp_path: Path) -> Collect:
        """Run `imatrix collect` with the second of the two devices broken in some way."""
        built = ROOT.glob("build/*/tests/native/libimatrix-two-devices.so")
        # under the name of a backend that the engine looks for
        shutil.copy(
            max(built, key=lambda path: path.stat().st_mtime),
            package / "imatrix/lib/libggml-opencl.so",
        )
        # the engine's children are to get this copy of the package too
        paths = f"{package}:{sysconfig.get_paths()['purelib']}"
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={paths} exec {sys.executable} -S "$@"\n')
        python.chmod(0o755)
        (tmp_path / "text.txt").write_text("one two three four five six seven " * 40)

        def collect(broken: str, *flags: str) -> subprocess.CompletedProcess[str]:
            argv = ["collect", "-m", str(trained_models()[0]), "-f", "text.txt", "-o", "out.gguf",
                    "-c", "64", "--chunks", "1", "-t", "1", *flags]  # fmt: skip
            return run(
                package,
                f"sys.executable = {str(python)!r}\nimport imatrix.cli\n"
                f"raise SystemExit(imatrix.cli.main({argv}))",
                BROKEN=broken,
            )

        return collect

    CURE = (
        "Of the GPUs, devices=[...] (-dev NAME,...) takes those that can be used, devices=[] "
        "(-dev none) none of them"
    )

    @pytest.mark.parametrize(
        ("broken", "why"),
        [
            ("init", "failed to initialize Broken1 backend"),
            ("memory", "failed to allocate Broken1 buffer"),
            ("context", "ggml-cuda/ggml-cuda.cu:109: CUDA error (CUDA error: out of memory; "
             "current device: 1,"),
            ("compute", "ggml-cuda/ggml-cuda.cu:109: CUDA error (CUDA error: no kernel image is "
             "available for execution on the device; current device: 1,"),
        ],
    )  # fmt: skip
    def test_it_is_named_with_the_cure(self, collect: Collect, broken: str, why: str) -> None:
        done = collect(broken, "-ngl", "99")
        assert done.returncode == 1, done.stderr
        told = " ".join(done.stderr.split())
        assert why in told
        assert self.CURE in told
        # nobody blames the model
        assert "Its metadata" not in told

    def test_without_it_all_is_well(self, collect: Collect, package: Path) -> None:
        done = collect("compute", "-ngl", "99", "-dev", "Sound0")
        assert done.returncode == 0, done.stderr
        assert (package / "out.gguf").exists()

    @pytest.mark.parametrize("flags", [("-dev", "none"), ("--list-devices",)])
    def test_what_leaves_it_alone_goes_on(self, collect: Collect, flags: tuple[str, ...]) -> None:
        done = collect("context", *flags)
        assert done.returncode == 0, done.stderr

    def test_as_much_as_fits_is_nothing_on_it(self, collect: Collect) -> None:
        """-ngl auto finds out what a device has no room for."""
        done = collect("memory")
        assert done.returncode == 0, done.stderr


# A backend that loads, as the engine asks of a module (ggml-backend-impl.h), and finds no device.
NO_CARD = """
#include "ggml-backend-impl.h"
static const char * name(ggml_backend_reg_t reg) { return "CUDA"; }
static size_t n_devices(ggml_backend_reg_t reg) { return 0; }
static ggml_backend_dev_t device(ggml_backend_reg_t reg, size_t index) { return 0; }
static void * function(ggml_backend_reg_t reg, const char * name) { return 0; }
ggml_backend_reg_t ggml_backend_init(void) {
    static struct ggml_backend_reg found = {
        GGML_BACKEND_API_VERSION, {name, n_devices, device, function}, 0};
    return &found;
}
"""


class TestCompanions:
    """imatrix-cuda (vendor/cuda), whose module lies in a folder of its own."""

    MODULE = "imatrix_cuda/lib/libggml-cuda.so"

    def installed(self, package: Path, version: str | None = imatrix.__version__) -> Path:
        """Lay it beside the package, as pip would; the path of its module, which is not there yet."""
        module = package / self.MODULE
        module.parent.mkdir(parents=True)
        # it is looked for, and not imported
        (package / "imatrix_cuda/__init__.py").write_text("raise ImportError('imported')")
        if version is not None:
            metadata = package / f"imatrix_cuda-{version}.dist-info/METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: imatrix-cuda\nVersion: {version}\n")
        return module

    def compiled(self, module: Path) -> None:
        ggml = ROOT / "vendor/llama.cpp/ggml"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", module,
             f"-I{ggml}/include", f"-I{ggml}/src"],
            input=NO_CARD, text=True, check=True,
        )  # fmt: skip

    @pytest.mark.engine("ggml/src/ggml-backend-impl.h", "what a backend's module exports")
    def test_its_backend_is_loaded(self, package: Path) -> None:
        self.compiled(self.installed(package))
        done = version(package)
        assert done.returncode == 0, done.stderr
        backends = next(line for line in done.stdout.splitlines() if line.startswith("backends"))
        assert "CUDA" in backends
        assert "unusable" not in done.stdout
        done = run(package, COLLECT.replace("MODEL", repr(str(trained_models()[0]))))
        assert done.returncode == 0, done.stderr
        assert done.stdout == "32 weights\n"
        assert done.stderr == ""

    def test_without_the_driver(self, package: Path) -> None:
        lib = package / "imatrix/lib"
        renamed(
            lib / "libimatrix-ggml.so",
            self.installed(package),
            ("libimatrix-ggml-base.so", "libcuda.so.1"),
        )
        if ctypes.util.find_library("cuda") is not None:
            pytest.skip("the driver is here")
        done = version(package)
        assert done.returncode == 0, done.stderr
        expected = (
            "libggml-cuda.so: libcuda.so.1: cannot open shared object file: No such file or "
            "directory (NVIDIA's driver brings it; nvidia-smi shows whether it is installed)"
        )
        assert f"unusable    {expected}\n" in done.stdout
        done = run(package, COLLECT.replace("MODEL", repr(str(trained_models()[0]))))
        assert done.returncode == 0, done.stderr
        assert done.stdout == "32 weights\n"
        assert f"the backend {expected.replace(': ', ' cannot be used here: ', 1)}\n" == done.stderr

    def test_of_another_version(self, package: Path) -> None:
        """It is not even opened: its structures may be others."""
        self.compiled(self.installed(package, "0.0.1"))
        done = version(package)
        assert done.returncode == 0, done.stderr
        ours = imatrix.__version__
        assert (
            f"unusable    libggml-cuda.so: imatrix-cuda 0.0.1 is not for imatrix {ours}; "
            f"pip install imatrix-cuda=={ours}\n"
        ) in done.stdout
        assert "CUDA" not in next(
            line for line in done.stdout.splitlines() if line.startswith("backends")
        )

    def test_of_no_known_version(self, package: Path) -> None:
        self.compiled(self.installed(package, None))
        done = version(package)
        assert done.returncode == 0, done.stderr
        assert "so its version is unknown; pip install imatrix-cuda==" in done.stdout

    def test_a_backend_that_is_there_already_is_left_alone(self, package: Path) -> None:
        """RPC is linked in here; a second one would list each device twice."""
        module = self.installed(package).with_name("libggml-rpc.so")
        self.compiled(module)
        done = version(package)
        assert done.returncode == 0, done.stderr
        assert "CUDA" not in done.stdout
        assert "unusable" not in done.stdout


class TestOtherCopies:
    """A second engine in the process, under the names that llama.cpp gives its libraries."""

    LOAD = """
import ctypes
flags = ctypes.RTLD_GLOBAL if GLOBAL else ctypes.RTLD_LOCAL
def load():
    other = [ctypes.CDLL(f"{FOLDER}/lib{name}.so", flags) for name in ("ggml-base", "ggml", "llama")]
    other[2].llama_backend_init()
    return other
def check(other):
    print(other[1].ggml_backend_reg_count(), "backends")
    libraries = {line.split()[-1].rsplit("/", 1)[-1] for line in open("/proc/self/maps")}
    # each has its own libraries
    assert {"libllama.so", "libggml-base.so"} <= libraries
    assert {"libimatrix-llama.so", "libimatrix-ggml-base.so"} <= libraries
"""

    def code(self, package: Path, body: str, *, whole_process: bool = False) -> str:
        others = package / "other/lib"
        others.mkdir(parents=True)
        lib = package / "imatrix/lib"
        linked = sorted(path.name for path in lib.glob("libimatrix-*.so"))
        for name in linked:
            plain = name.replace("imatrix-", "")
            needs = lib.joinpath(name).read_bytes()
            renamed(
                lib / name,
                others / plain,
                *((old, old.replace("imatrix-", "")) for old in linked
                  if old.encode() + b"\0" in needs),
            )  # fmt: skip
        load = self.LOAD.replace("GLOBAL else", f"{whole_process} else")
        return (load + body).replace("{FOLDER}", str(others)).replace(
            "MODEL", repr(str(trained_models()[0]))
        )  # fmt: skip

    def test_loaded_before(self, package: Path) -> None:
        done = run(package, self.code(package, f"other = load()\n{COLLECT}\ncheck(other)"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("32 weights\n")

    def test_loaded_after(self, package: Path) -> None:
        done = run(package, self.code(package, f"{COLLECT}\nother = load()\ncheck(other)"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("32 weights\n")

    def test_one_that_the_whole_process_sees_is_refused(self, package: Path) -> None:
        """Every call of the engine's would go to that copy, of whatever version."""
        code = self.code(package, f"other = load()\n{COLLECT}", whole_process=True)
        done = run(package, code)
        assert done.returncode == 1
        assert "EngineError: " in done.stderr
        assert "another copy of ggml, " in done.stderr
        assert "other/lib/libggml.so, was loaded for the whole process (RTLD_GLOBAL)" in done.stderr
        assert "Load it without RTLD_GLOBAL" in done.stderr

    def test_one_that_the_whole_process_sees_after_ours(self, package: Path) -> None:
        code = self.code(package, f"{COLLECT}\nother = load()\ncheck(other)", whole_process=True)
        done = run(package, code)
        assert done.returncode == 0, done.stderr


class TestKernel:
    @pytest.mark.parametrize("kernel", engine.row_kernel_names())
    def test_a_named_one_is_used(self, kernel: str) -> None:
        code = (
            "from imatrix.native import engine\n"
            "import imatrix\n"
            "print(engine.chosen_row_kernel(), imatrix.backends().row_kernel)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "IMATRIX_KERNEL": kernel},
        )
        assert done.stdout.split() == [kernel, kernel], done.stderr

    def test_the_best_is_used_if_none_is_named(self) -> None:
        # an empty variable names none
        code = "from imatrix.native import engine\nprint(engine.chosen_row_kernel())"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "IMATRIX_KERNEL": ""},
        )
        assert done.stdout.strip() == engine.row_kernel_names()[0], done.stderr

    def test_one_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        here = ", ".join(engine.row_kernel_names())
        refusal = f"IMATRIX_KERNEL=avx3: this processor has no such row kernel. It can run {here}"
        (tmp_path / "text.txt").write_text("one two three four five " * 40)
        for command in (
            ["--version"],
            ["collect", "-m", trained_models()[0], "-f", tmp_path / "text.txt", "-c", "64",
             "-o", tmp_path / "out.gguf"],
        ):  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-m", "imatrix", *command],
                capture_output=True,
                text=True,
                env={**os.environ, "IMATRIX_KERNEL": "avx3"},
            )
            assert done.returncode == 2, done.stderr
            assert refusal in " ".join(done.stderr.split())
        assert not (tmp_path / "out.gguf").exists()
