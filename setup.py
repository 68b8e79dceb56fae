"""Bridges setuptools to CMake, which alone knows how the native module is built. Metadata is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Configure, build, and install `_C` to where setuptools wants it (in the tree with --inplace)."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        configure = [
            "cmake",
            *("-S", str(Path(__file__).resolve().parent), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={package.parent}",
        ]
        # An isolated build's tools are gone by the next one: remember none of them, but keep the objects.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install", "--parallel", jobs], check=True)


setup(ext_modules=[Extension("knowedit_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
