"""Give the inputs of one layer different bits, by their salience: SliM-LLM, its smallest form.

SliM-LLM (Huang et al., arXiv:2405.14917) lets salient groups of inputs have one bit more, and as
many of the least salient one bit less. With W (out, in) and H the Hessian of `gptq`, an input's
salience is

    mean_i W_ij^2 / (H^-1)_jj^2,

and how many groups change is what has the smallest error, which is taken here from codes that do
not compensate one another: sum_ij E_ij^2 / (H^-1)_jj, what compensation leaves of E_ij alone. The
paper's groups are neighbouring inputs, of which hardly any would change in the models here: these
are of inputs of like salience. Rounding and steps are those of `gptq`, fitted to each group under
the importance of its inputs; where no group changes, the result is that of `gptq`.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from splitquant_mlx.quantization.affine import pack_groups
from splitquant_mlx.quantization.gptq import compensated_grid, damped_hessian, unit_upper
from splitquant_mlx.quantization.group_fit import fit_group, nearest_codes


class Mixed(NamedTuple):
    """One weight whose inputs have codes of up to three numbers of bits, the fewest first.

    Attributes:
        weight: packed codes, uint32 (out * in * bits / 32,).
        scales: (out * in / group_size,).
        biases: like scales.
        widths: bits of each input's codes, uint8 (in,).
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    widths: mx.array


def salience_quantize(
    w: mx.array, hessian: np.ndarray, *, bits: int = 3, group_size: int = 64, sweeps: int = 1
) -> Mixed:
    """Quantize `w` to codes of `bits` bits on average.

    Args:
        w: float weight (out, in), `in` a multiple of `group_size`.
        hessian: mean of x x^T over the layer's inputs x, (in, in) float32.
        bits: of a code on average, 2 to 5.
        group_size: inputs of equal bits that share scale and bias.
        sweeps: rounds of coordinate descent, as of `gptq_quantize`.
    """
    h = damped_hessian(hessian)
    columns = np.ascontiguousarray(np.array(w.astype(mx.float32)).T)
    widths = _widths(columns, h, bits, group_size)
    order = np.argsort(widths, kind="stable")
    columns, h = columns[order], np.ascontiguousarray(h[np.ix_(order, order)])
    each = widths[order][::group_size].tolist()
    grid = compensated_grid(columns, h, unit_upper(h).T, w.dtype, each, group_size)
    for refit in [True] * sweeps + [False] * bool(sweeps):
        grid.sweep(refit=refit)
    parts = []
    for width in sorted(set(each)):
        own = slice(each.index(width), each.index(width) + each.count(width))
        groups = grid.codes[own], grid.scales[own], grid.biases[own]
        parts.append(pack_groups(*groups, bits=width, dtype=w.dtype))
    weight, scales, biases = (
        mx.concatenate([array.reshape(-1) for array in arrays])
        for arrays in zip(*parts, strict=True)
    )
    return Mixed(weight, scales, biases, mx.array(widths))


def _widths(columns: np.ndarray, h: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """Return the bits of each input's codes, uint8 (in,)."""
    inverse = np.diagonal(np.linalg.inv(h.astype(np.float64))).astype(np.float32)
    order = np.argsort(np.square(columns).mean(1) / np.square(inverse), kind="stable")
    groups = order.reshape(-1, group_size)
    half = len(groups) // 2
    costs = np.zeros((3, len(groups)))  # of one bit less, as many, and one more
    for group, own in enumerate(groups):
        for change in range(3):
            top, wanted = 2 ** (bits - 1 + change) - 1, columns[own]
            scale, bias = fit_group(wanted, h[own, own], top=top, stored=np.asarray)
            error = wanted - nearest_codes(wanted, scale, bias, top) * scale - bias
            costs[change, group] = (np.square(error) / inverse[own, None]).sum()
    less, more = costs[0] - costs[1], (costs[2] - costs[1])[::-1]
    changed = int(np.argmin(np.append(0, np.cumsum((less + more)[:half]))))
    widths = np.full(len(columns), bits, np.uint8)
    widths[groups[:changed]] = bits - 1
    widths[groups[len(groups) - changed :]] = bits + 1
    return widths
