"""Arrays in, arrays out: k-means, split, affine codes, imatrix, GPTQ, allocation of bits."""
