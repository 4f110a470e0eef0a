"""Round the channels of a group in order, with feedback of each error to later channels.

Rows are independent. On a GPU, each row has one thread, with the group in registers; on the CPU,
numpy processes all rows at once.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

RUN = 8  # channels between two matrix products (CPU)
ROWS = 256  # rows per thread group (GPU)
ROW_INDEX = {
    "metal": "uint row = thread_position_in_grid.x;",
    "cuda": "unsigned int row = cooperative_groups::this_grid().thread_rank();",
}
SOURCE = """
    if (row < OUT) {
        float goal[GROUP];
        for (int k = 0; k < GROUP; ++k) {
            goal[k] = target[k * OUT + row];
        }
        float step = scale[row], zero = bias[row], inverse = 1 / step;
        for (int k = 0; k < GROUP; ++k) {
            float code = rint((goal[k] - zero) * inverse);
            code = code < 0 ? 0 : (code > TOP ? TOP : code);
            float error = reference[k * OUT + row] - (code * step + zero);
            codes[k * OUT + row] = code;
            errors[k * OUT + row] = error;
            for (int j = k + 1; j < GROUP; ++j) {
                goal[j] += feedback[j * GROUP + k] * error;
            }
        }
    }
"""


def round_group(
    target: Any, reference: Any, feedback: Any, scale: Any, bias: Any, top: int
) -> tuple[Any, Any]:
    """Return codes and errors (group_size, out), float32.

    Channel k gets the code c_k, 0 to `top`, whose value c_k scale + bias is nearest to

        target_k + sum_{j<k} feedback_kj error_j,   error_j = reference_j - (c_j scale + bias)

    Args:
        target: (group_size, out) float32; overwritten if it is a numpy array.
        reference: (group_size, out) float32.
        feedback: (group_size, group_size) float32; only the part below the diagonal is used.
        scale: (out,) float32, not 0.
        bias: (out,) float32.
        top: the highest code.

    The arrays are all numpy arrays, or all mlx arrays, which need a GPU.
    """
    if isinstance(target, np.ndarray):
        return _by_numpy(target, reference, feedback, scale, bias, top)
    return _by_kernel(target, reference, feedback, scale, bias, top)


def _by_numpy(
    target: np.ndarray,
    reference: np.ndarray,
    feedback: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    top: int,
) -> tuple[np.ndarray, np.ndarray]:
    codes, errors = np.empty_like(target), np.empty_like(target)
    inverse = 1 / scale
    for start in range(0, len(target), RUN):
        end = start + RUN
        for k in range(start, end):
            code, error = codes[k], errors[k]
            np.subtract(target[k], bias, out=code)
            np.rint(np.multiply(code, inverse, out=code), out=code)
            np.minimum(np.maximum(code, 0, out=code), top, out=code)
            np.add(np.multiply(code, scale, out=error), bias, out=error)
            np.subtract(reference[k], error, out=error)
            target[k + 1 : end] += feedback[k + 1 : end, k, None] * error
        target[end:] += feedback[end:, start:end] @ errors[start:end]
    return codes, errors


def _by_kernel(
    target: mx.array,
    reference: mx.array,
    feedback: mx.array,
    scale: mx.array,
    bias: mx.array,
    top: int,
) -> tuple[mx.array, mx.array]:
    group_size, out = target.shape
    codes, errors = _kernel()(
        inputs=[target, reference, feedback, scale, bias],
        template=[("GROUP", group_size), ("OUT", out), ("TOP", top)],
        grid=(-(-out // ROWS) * ROWS, 1, 1),
        threadgroup=(ROWS, 1, 1),
        output_shapes=[target.shape, target.shape],
        output_dtypes=[mx.float32, mx.float32],
    )
    return codes, errors


@cache
def _kernel() -> Any:
    metal = mx.metal.is_available()
    make = mx.fast.metal_kernel if metal else mx.fast.cuda_kernel
    return make(
        name="round_group",
        input_names=["target", "reference", "feedback", "scale", "bias"],
        output_names=["codes", "errors"],
        source=ROW_INDEX["metal" if metal else "cuda"] + SOURCE,
    )


@cache
def kernel_works() -> bool:
    """Return whether the default device supports the kernel, with the same results as numpy."""
    if mx.default_device() == mx.cpu:
        return False
    try:
        return kernel_difference() < 1e-3
    except Exception:  # mlx does not document what it raises if compilation fails
        return False


def kernel_difference() -> float:
    """Return the largest difference between the errors of kernel and numpy on a random group."""
    rng = np.random.default_rng(0)
    target, reference = rng.standard_normal((2, 64, ROWS + 3)).astype(np.float32)
    feedback = (0.1 * rng.standard_normal((64, 64))).astype(np.float32)
    scale = np.full(ROWS + 3, 0.5, np.float32)
    arguments: list[Any] = [target, reference, feedback, scale, -4 * scale, 15]
    _, expected = _by_numpy(target.copy(), *arguments[1:])
    arguments[:5] = map(mx.array, arguments[:5])
    _, actual = _by_kernel(*arguments)
    return float(np.abs(np.array(actual) - expected).max())
