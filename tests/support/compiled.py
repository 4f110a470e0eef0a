"""Compile the body of a GPU kernel as C++, and run it on arrays of numpy's, thread by thread."""

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def run_kernel(
    body: str,
    directory: Path,
    *,
    threads: int,
    constants: Mapping[str, int],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    index: str = "row",
) -> None:
    """Fill `outputs`, as `threads` threads do that run `body`, each with its own `index`."""
    arguments = [f"const {_type(x)}* {name}" for name, x in inputs.items()]
    arguments += [f"{_type(x)}* {name}" for name, x in outputs.items()]
    named = "".join(f"constexpr int {name} = {value};\n" for name, value in constants.items())
    source = f"""
#include <cmath>
#include <cstdint>
using namespace std;
{named}
extern "C" void run(int threads, {", ".join(arguments)}) {{
    for (int {index} = 0; {index} < threads; ++{index}) {{ {body} }}
}}
"""
    (directory / "kernel.cpp").write_text(source)
    library = directory / "kernel.so"
    command = ["g++", "-O1", "-shared", "-fPIC", "-o", str(library), str(directory / "kernel.cpp")]
    subprocess.run(command, check=True, timeout=60)
    arrays: Sequence[np.ndarray] = [*inputs.values(), *outputs.values()]
    assert all(array.flags["C_CONTIGUOUS"] for array in arrays)
    ctypes.CDLL(str(library)).run(threads, *(ctypes.c_void_p(x.ctypes.data) for x in arrays))


def _type(array: np.ndarray) -> str:
    return {"float32": "float", "uint32": "uint32_t", "int32": "int32_t"}[array.dtype.name]
