"""Services of the machine: disk, cache, memory, cores, BLAS, package versions, ranks."""
