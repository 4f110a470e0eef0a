"""Share work out among a CPU's cores."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def helpers() -> ThreadPoolExecutor:
    """Return threads that stay, one a core: mlx keeps something for each that it computes in."""
    return ThreadPoolExecutor(os.cpu_count())
