"""What the machine gives: disk, cache, BLAS, versions, ranks."""
