# SPDX-License-Identifier: Apache-2.0
"""pip's door to CMakeLists.txt: configures, builds and installs the wheel. No build logic here.

EQUIPOISE_CUDA=0 or 1 overrides CMake's choice, CMAKE_ARGS is passed on, CMAKE_BUILD_PARALLEL_LEVEL
sets the number of jobs (2). The build tree is build/cmake: a second build compiles what changed.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_TREE = ROOT / "build" / "cmake"


def project_version() -> str:
    """CMakeLists.txt is where the version stands."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    return re.search(r"project\(equipoise VERSION ([\d.]+)", cmake)[1]


def torch_requirement() -> str:
    """The wheel is tied to the minor version of the torch that it is built against."""
    try:
        major, minor = importlib.metadata.version("torch").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("equipoise is built against an installed torch: install that") from None
    return f"torch=={major}.{minor}.*"


class CleanBuild(build):
    """Empties build_lib first: files that have left the source must not stay in the wheel."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if not shutil.which("cmake"):
            raise SystemExit("equipoise needs CMake 3.25 or newer: pip install cmake ninja")
        configure = ["cmake", "-S", ROOT, "-B", BUILD_TREE]
        if shutil.which("ninja") and not (BUILD_TREE / "CMakeCache.txt").exists():
            configure.append("-GNinja")
        torch_root = importlib.util.find_spec("torch").submodule_search_locations[0]
        configure += [
            "-UEQUIPOISE_*",  # decide about CUDA anew each time
            "-DEQUIPOISE_PYTHON=ON",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DTORCH_INSTALL_PREFIX={torch_root}",
        ]
        if os.getenv("EQUIPOISE_CUDA"):
            configure.append(f"-DEQUIPOISE_CUDA={os.environ['EQUIPOISE_CUDA']}")
        configure += shlex.split(os.getenv("CMAKE_ARGS", ""))
        compile_ = ["cmake", "--build", BUILD_TREE, "--target", "_C"]
        if not os.getenv("CMAKE_BUILD_PARALLEL_LEVEL"):
            compile_.append("-j2")
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        install = ["cmake", "--install", BUILD_TREE, "--prefix", package]
        for command in (configure, compile_, install):
            if subprocess.run(command).returncode:  # what went wrong is printed above
                raise SystemExit("equipoise: failed: " + shlex.join(map(str, command)))


setup(
    version=project_version(),
    install_requires=[torch_requirement()],
    ext_modules=[Extension("equipoise._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
