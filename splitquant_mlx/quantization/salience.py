"""Quantize a layer with bit widths by the salience of its inputs: a minimal form of SliM-LLM.

SliM-LLM (Huang et al., arXiv:2405.14917) gives salient groups of inputs one bit more, and the same
number of the least salient groups one bit less. With W (out, in) and H the Hessian of `gptq`, the
salience of input j is

    mean_i W_ij^2 / (H^-1)_jj^2.

The number of changed groups is that of least error, estimated from codes without compensation as
sum_ij E_ij^2 / (H^-1)_jj: the cost of E_ij alone, if all other errors compensate it. The groups in
the paper are neighbouring inputs, of which hardly any would change in the models measured; here
they are inputs of similar salience. Rounding and sweeps are those of `gptq`, with scales fitted to
each group; if no group changes, the result is that of `gptq`.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from splitquant_mlx.quantization.affine import pack_groups
from splitquant_mlx.quantization.gptq import compensated_grid, damped_hessian, unit_upper
from splitquant_mlx.quantization.group_fit import fit_groups, nearest_codes


class Mixed(NamedTuple):
    """Quantized weight with up to three bit widths, one per input; arrays by ascending bit width.

    Attributes:
        weight: packed codes, uint32 (out * in * bits / 32,).
        scales: (out * in / group_size,).
        biases: like scales.
        widths: bits per code of each input, uint8 (in,).
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    widths: mx.array


def salience_quantize(
    w: mx.array, hessian: np.ndarray, *, bits: int = 3, group_size: int = 64, sweeps: int = 1
) -> Mixed:
    """Quantize `w` to an average of `bits` bits per code.

    Args:
        w: float weight (out, in), `in` a multiple of `group_size`.
        hessian: mean of x x^T over the layer's inputs x, (in, in) float32.
        bits: average bits per code, 2 to 5.
        group_size: inputs of one bit width that share a scale and a bias.
        sweeps: rounds of coordinate descent, as in `gptq_quantize`.
    """
    h = damped_hessian(hessian)
    columns = np.ascontiguousarray(np.array(w.astype(mx.float32)).T)
    widths = _widths(columns, h, bits, group_size)
    order = np.argsort(widths, kind="stable")
    columns, h = columns[order], np.ascontiguousarray(h[np.ix_(order, order)])
    group_bits = widths[order][::group_size].tolist()
    grid = compensated_grid(columns, h, unit_upper(h).T, w.dtype, group_bits, group_size)
    for refit in [True] * sweeps + [False] * bool(sweeps):
        grid.sweep(refit=refit)
    parts = []
    for width in sorted(set(group_bits)):
        first = group_bits.index(width)
        same = slice(first, first + group_bits.count(width))
        groups = grid.codes[same], grid.scales[same], grid.biases[same]
        parts.append(pack_groups(*groups, bits=width, dtype=w.dtype))
    weight, scales, biases = (
        mx.concatenate([array.reshape(-1) for array in arrays])
        for arrays in zip(*parts, strict=True)
    )
    return Mixed(weight, scales, biases, mx.array(widths))


def _widths(columns: np.ndarray, h: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """Return the bits per code of each input, uint8 (in,)."""
    inverse = np.diagonal(np.linalg.inv(h.astype(np.float64))).astype(np.float32)
    order = np.argsort(np.square(columns).mean(1) / np.square(inverse), kind="stable")
    groups = order.reshape(-1, group_size)
    half = len(groups) // 2
    costs = np.zeros((3, len(groups)))  # with bits - 1, bits and bits + 1
    for group, inputs in enumerate(groups):
        values = columns[inputs]
        for change in range(3):
            top = 2 ** (bits - 1 + change) - 1
            scale, bias = fit_groups(values, h[inputs, inputs], top=top, stored=np.asarray)
            error = values - nearest_codes(values, scale, bias, top) * scale - bias
            costs[change, group] = (np.square(error) / inverse[inputs, None]).sum()
    fewer, more = costs[0] - costs[1], (costs[2] - costs[1])[::-1]
    changed = int(np.argmin(np.append(0, np.cumsum((fewer + more)[:half]))))
    widths = np.full(len(columns), bits, np.uint8)
    widths[groups[:changed]] = bits - 1
    widths[groups[len(groups) - changed :]] = bits + 1
    return widths
