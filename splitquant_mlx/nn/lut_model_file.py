"""Model file of checkpoints with lookup-table or mixed-bit layers.

The counterpart of `split_model_file` for these layers: mlx-lm and mlx-vlm build the model from this
file, so it imports only mlx.

Each row of a `LUTLinear` has a codebook of 2^bits values. On a GPU, a kernel unpacks the codes,
looks them up and accumulates the products without materializing the weight (as LUT-GEMM does, Park
et al., arXiv:2206.09557). Without a kernel, or for many tokens, the weight is dequantized by mlx
operations first. A `MixedLinear` has up to three bit widths, one for each input, and computes one
quantized product per bit width.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.nn.build_model import build_model

KERNEL_MAX_TOKENS = 8  # the kernel reads all codes once per token
LANES = 32  # threads per row

# one row and one token; 8 codes take `BITS` bytes
BODY = """
    if (row >= OUT) return;
    DEVICE const unsigned char* packed =
        (DEVICE const unsigned char*)weight + (size_t)row * (IN / 8 * BITS);
    auto table = codebook + (size_t)row * (1 << BITS);
    auto input = x + (size_t)token * IN;
    float sum = 0;
    for (int unit = lane; unit < IN / 8; unit += LANES) {
        unsigned int codes = 0;
        for (int byte = 0; byte < BITS; byte++)
            codes |= (unsigned int)packed[unit * BITS + byte] << (8 * byte);
        for (int i = 0; i < 8; i++) {
            float value = static_cast<float>(table[codes >> (BITS * i) & ((1 << BITS) - 1)]);
            sum += value * static_cast<float>(input[8 * unit + i]);
        }
    }
    for (int i = lane; i < OUTLIERS; i += LANES) {
        size_t place = (size_t)row * OUTLIERS + i;
        sum += static_cast<float>(outliers[place]) * static_cast<float>(input[indices[place]]);
    }
    sum = SUM(sum);
    if (lane == LANES - 1) y[(size_t)token * OUT + row] = static_cast<T>(sum);
"""
METAL_HEADER = """
#define DEVICE device
#define LANES 32
#define SUM(value) metal::simd_sum(value)
"""
METAL = """
    int row = thread_position_in_grid.x / LANES, token = thread_position_in_grid.y;
    int lane = thread_position_in_grid.x % LANES;
"""
CUDA_HEADER = """
#define DEVICE
#define LANES 32
__device__ inline float sum_of_lanes(float value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
    return value;
}
#define SUM(value) sum_of_lanes(value)
"""
CUDA = """
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, token = blockIdx.y;
    int lane = threadIdx.x % LANES;
"""
NAMES = {
    "input_names": ["x", "weight", "codebook", "outliers", "indices"],
    "output_names": ["y"],
}
KERNELS: dict = {}  # filled on first use


def lut_weight(
    weight: mx.array,
    codebook: mx.array,
    outliers: mx.array | None = None,
    indices: mx.array | None = None,
) -> mx.array:
    """Return the dequantized weight (out, in) of a `LUTLinear`, in the dtype of `codebook`."""
    bits = codebook.shape[-1].bit_length() - 1
    units = weight.view(mx.uint8).reshape(len(weight), -1, bits).astype(mx.uint32)
    words: mx.array = sum(units[..., byte] << (8 * byte) for byte in range(bits))  # type: ignore
    codes = (words[..., None] >> (bits * mx.arange(8, dtype=mx.uint32))) & (2**bits - 1)
    w = mx.take_along_axis(codebook, codes.reshape(len(weight), -1), axis=-1)
    if outliers is None or indices is None:
        return w
    return w.at[mx.arange(len(weight))[:, None], indices].add(outliers)


class LUTLinear(nn.Module):
    """Linear layer whose weights are looked up in one codebook per output.

    Parameters: `weight` (out, in * bits / 32) uint32, `codebook` (out, 2^bits), and optionally
    `outliers` and `indices` (out, n), values added to the dequantized weight and their columns,
    and `bias` (out,).

    Args:
        input_dims: in, a multiple of 32.
        output_dims: out.
        bias: whether the layer has a bias.
        bits: bits per code, 2 to 4.
        outliers: outliers per row.
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        *,
        bits: int = 4,
        outliers: int = 0,
    ):
        super().__init__()
        self.bits = bits
        self.weight = mx.zeros((output_dims, input_dims * bits // 32), mx.uint32)
        self.codebook = mx.zeros((output_dims, 2**bits))
        if outliers:
            self.outliers = mx.zeros((output_dims, outliers))
            wide = input_dims >= 1 << 16
            self.indices = mx.zeros((output_dims, outliers), mx.uint32 if wide else mx.uint16)
        if bias:
            self.bias = mx.zeros((output_dims,))
        self.freeze()

    def _extra_repr(self) -> str:
        out, words = self.weight.shape
        outliers = self.outliers.shape[1] if "outliers" in self else 0
        return (
            f"input_dims={words * 32 // self.bits}, output_dims={out}, bias={'bias' in self}, "
            f"bits={self.bits}, outliers={outliers}"
        )

    def dense(self) -> mx.array:
        """Return the dequantized weight (out, in)."""
        return lut_weight(
            self["weight"], self["codebook"], self.get("outliers"), self.get("indices")
        )

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out) in the dtype of x."""
        kernel = _kernel() if x.size // x.shape[-1] <= KERNEL_MAX_TOKENS else None
        y = x @ self.dense().T.astype(x.dtype) if kernel is None else self._run(kernel, x)
        return y + self["bias"] if "bias" in self else y

    def _run(self, kernel: object, x: mx.array) -> mx.array:
        out, tokens = len(self["weight"]), x.size // x.shape[-1]
        count = self.outliers.shape[1] if "outliers" in self else 0
        sizes = {"IN": x.shape[-1], "OUT": out, "BITS": self.bits, "OUTLIERS": count}
        # unused placeholders if there are no outliers
        sparse = (self["outliers"], self["indices"]) if count else (self.codebook, self.weight)
        (y,) = kernel(  # type: ignore[operator]
            inputs=[x, self["weight"], self["codebook"], *sparse],
            template=[("T", x.dtype), *sizes.items()],
            grid=(out * LANES, tokens, 1),
            threadgroup=(4 * LANES, 1, 1),
            output_shapes=[(*x.shape[:-1], out)],
            output_dtypes=[x.dtype],
        )
        return y


def _kernel() -> object | None:
    """Return the kernel for the default device; None on the CPU."""
    if mx.default_device() == mx.cpu:
        return None
    if not KERNELS:
        if mx.metal.is_available():
            make, head, header = mx.fast.metal_kernel, METAL, METAL_HEADER
        else:
            make, head, header = mx.fast.cuda_kernel, CUDA, CUDA_HEADER
        settings = {"source": head + BODY, "header": header, **NAMES}
        KERNELS["lut"] = make(name="lut_linear", **settings)  # type: ignore
    return KERNELS["lut"]


def mixed_parts(
    weight: mx.array, scales: mx.array, biases: mx.array, widths: mx.array
) -> list[tuple[mx.array, list[mx.array], dict[str, int]]]:
    """Divide the parameters of a `MixedLinear` by bit width.

    Returns:
        For each bit width, ascending: the indices of its inputs; `weight`, `scales` and `biases`
        (out, ...) for mlx's quantized operations; and their `bits` and `group_size`.
    """
    bits: list[int] = widths.tolist()  # type: ignore
    out = 32 * weight.size // sum(bits)
    group_size = out * len(bits) // scales.size
    parts, word, group = [], 0, 0
    for width in sorted(set(bits)):
        inputs = [channel for channel, b in enumerate(bits) if b == width]
        groups = out * len(inputs) // group_size
        words = groups * group_size * width // 32
        codes = weight[word : word + words] if width > 1 else one_to_two_bits(weight[:words])
        arrays = codes, *(array[group : group + groups] for array in (scales, biases))
        settings = {"bits": max(width, 2), "group_size": group_size}
        parts.append((mx.array(inputs), [array.reshape(out, -1) for array in arrays], settings))
        word, group = word + words, group + groups
    return parts


def one_to_two_bits(words: mx.array) -> mx.array:
    """Repack 1-bit codes as 2-bit codes: not every mlx version supports 1 bit."""
    words = mx.stack([words & 0xFFFF, words >> 16], axis=-1)
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        words = (words | words << shift) & mask
    return words


def mixed_weight(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    widths: mx.array,
    rows: slice = slice(None),
) -> mx.array:
    """Return `rows` of the dequantized float32 weight (out, in) of a `MixedLinear`."""
    parts = mixed_parts(weight, scales.astype(mx.float32), biases.astype(mx.float32), widths)
    columns = [mx.dequantize(*(a[rows] for a in arrays), **kw) for _, arrays, kw in parts]  # type: ignore
    order = mx.concatenate([inputs for inputs, _, _ in parts])
    return mx.concatenate(columns, axis=1)[:, mx.argsort(order)]


class MixedLinear(nn.Module):
    """Quantized linear layer in which some inputs have one bit more and some one bit less.

    Parameters: `weight` (out * in * bits / 32,) uint32, `scales` and `biases`
    (out * in / group_size,), `widths` (in,) uint8, the bits per code of each input, and optionally
    `bias` (out,). The arrays are concatenated by bit width, ascending.

    Args:
        input_dims: in, a multiple of `group_size`.
        output_dims: out.
        bias: whether the layer has a bias.
        bits: average bits per code.
        group_size: inputs of one bit width that share a scale and a bias.
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        *,
        bits: int = 3,
        group_size: int = 64,
    ):
        super().__init__()
        entries = output_dims * input_dims
        self.weight = mx.zeros((entries * bits // 32,), mx.uint32)
        self.scales = mx.zeros((entries // group_size,))
        self.biases = mx.zeros((entries // group_size,))
        self.widths = mx.full((input_dims,), bits, mx.uint8)
        if bias:
            self.bias = mx.zeros((output_dims,))
        self._parts: tuple = ()  # parameters of the last call, and `mixed_parts` of them
        self.freeze()

    def dense(self) -> mx.array:
        """Return the dequantized weight (out, in)."""
        return mixed_weight(*(self[leaf] for leaf in ("weight", "scales", "biases", "widths")))

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out) in the dtype of x."""
        stored = [self[leaf] for leaf in ("weight", "scales", "biases", "widths")]
        if not self._parts or any(a is not b for a, b in zip(stored, self._parts[0], strict=True)):
            self._parts = stored, mixed_parts(*stored)
        first, *others = [
            mx.quantized_matmul(x[..., inputs], *arrays, **settings)
            for inputs, arrays, settings in self._parts[1]
        ]
        y = sum(others, start=first).astype(x.dtype)
        return y + self["bias"] if "bias" in self else y


LAYERS = {"lut": LUTLinear, "mixed": MixedLinear}


def quantized_layer(kind: str, linear: nn.Module | None, settings: dict) -> nn.Module | None:
    """Return an uninitialized layer of the shape of `linear`; None if not a linear layer."""
    if type(linear) is not nn.Linear:
        return None
    return LAYERS[kind](*reversed(linear.weight.shape), "bias" in linear, **settings)


class NotSharded(nn.Module):
    """Mixin that overrides mlx-lm's `shard`, which does not support these layers."""

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Raise ValueError."""
        raise ValueError(
            "layers of methods lut and salience cannot be sharded: convert with another method"
        )


def Model(args: Any) -> nn.Module:
    """Build the model of mlx-lm or mlx-vlm with lookup-table or mixed-bit layers."""
    return build_model(args, quantized_layer, NotSharded)
