"""Parse and format sizes: powers of ten (GB) or of two (GiB)."""

import re

WRITTEN = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt])(i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Return the number of bytes of a size such as "4.2GB" (10^9) or "4GiB" (2^30).

    Raises:
        ValueError: with a message of one line.
    """
    if not (found := WRITTEN.fullmatch(text)):
        raise ValueError(f"expected a size such as 4.2GB, 900MB or 4GiB, got {text!r:.40}")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (1 + "kmgt".index(unit.lower())))


def size(nbytes: float) -> str:
    """Return a size in GB, MB or kB, powers of ten."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes / 1e3:.1f} kB"
