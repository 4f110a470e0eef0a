"""Quantization on arrays: k-means, split, affine codes, imatrix, GPTQ, bit allocation."""
