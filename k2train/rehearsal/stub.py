"""Give a torch without CUDA the name of a device: builds `stub.cpp` once and loads it. Imports no
torch itself.

torch looks for the hooks of CUDA once, while it is imported, so the library must be there before.
Where torch was built with CUDA nothing is needed. The library depends on torch's version and on the
source, and is kept under the user's cache directory by a name made of both.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from k2train.config.errors import ConfigError

SOURCE = Path(__file__).with_name("stub.cpp")
REMEDY = "install g++ (Debian: apt-get install g++) or name a C++ compiler in CXX"


def load_stub() -> None:
    """Make fake tensors on cuda:0 work in this process. Call before torch is imported.

    Raises ConfigError where there is no C++ compiler, or it cannot build the library.
    """
    torch = torch_folder()
    if built_with_cuda(torch):
        return
    assert "torch" not in sys.modules, "the stub is loaded before torch, or torch does not see it"
    library = cached_library(torch)
    if not library.exists():
        build_stub(torch, library)
    # torch's own library first, for the stub's symbols.
    ctypes.CDLL(str(torch / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def torch_folder() -> Path:
    """Where torch is installed."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def built_with_cuda(torch: Path) -> bool:
    """Whether this torch has CUDA of its own."""
    return any((torch / "lib").glob("libtorch_cuda*")) or any((torch / "lib").glob("libc10_cuda*"))


def cached_library(torch: Path) -> Path:
    """The library's place: another torch, another Python or another source has another."""
    key = hashlib.sha256(SOURCE.read_bytes())
    for part in ((torch / "version.py").read_bytes(), sysconfig.get_platform().encode()):
        key.update(part)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "k2train" / f"rehearsal-{key.hexdigest()[:16]}.so"


def build_stub(torch: Path, library: Path) -> None:
    """Compile the source against torch's headers; seconds. Two processes may do so at once."""
    words = os.environ.get("CXX", "").split() or [shutil.which("g++") or shutil.which("c++") or ""]
    if not words[0]:
        raise ConfigError("rehearse", "cuda:0", "needs a C++ compiler once, and none was found", REMEDY)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            unfinished = Path(folder) / library.name
            subprocess.run(
                [*words, *compiler_arguments(torch), "-o", str(unfinished)],
                check=True,
                capture_output=True,
                text=True,
            )
            unfinished.replace(library)
    except OSError as error:
        raise ConfigError("rehearse", str(library), f"cannot be made: {error}", REMEDY) from error
    except subprocess.CalledProcessError as error:
        told = " | ".join(error.stderr.strip().splitlines()[:3])
        raise ConfigError("rehearse", str(library), f"the compiler refused: {told}", REMEDY) from error


def compiler_arguments(torch: Path) -> list[str]:
    """C++20 is what torch 2.13's headers are written in."""
    return [
        "-shared",
        "-fPIC",
        "-O1",
        "-std=c++20",
        str(SOURCE),
        f"-I{torch / 'include'}",
        f"-L{torch / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
    ]
