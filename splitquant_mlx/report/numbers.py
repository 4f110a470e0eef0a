"""Format numbers for tables, plots and sentences; "-" for a missing value."""

import math

MISSING = "-"


def significant(value: float | None, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits, scientific outside 1e-4 to 1e6."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(digits - 1 - exponent, 0)}f}"


def decimals(value: float | None, digits: int) -> str:
    """Return `value` with `digits` decimals."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def megabytes(nbytes: float | None) -> str:
    """Return bytes in MB (10^6), with three significant digits below 100 MB, else as an integer."""
    if nbytes is None:
        return MISSING
    return significant(nbytes / 1e6) if nbytes < 1e8 else f"{nbytes / 1e6:,.0f}"


def percent(share: float | None) -> str:
    """Return a fraction of 0 to 1 in percent."""
    return MISSING if share is None else f"{share * 100:.1f}"


def plus_minus(value: str, error: str) -> str:
    """Return a value with its standard error; the value only if the error is missing."""
    return value if error == MISSING else f"{value} ± {error}"


def probability(p: float | None) -> str:
    """Return a p-value with three decimals."""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def times(ratio: float | None) -> str:
    """Return a ratio with the suffix "x"."""
    return MISSING if ratio is None else f"{significant(ratio)} x"


def ratio(value: float | None, base: float | None) -> float | None:
    """Return value / base; None if either is missing or the base is 0."""
    return None if value is None or not base else value / base


def perplexity(value: float | None) -> str:
    """Return a perplexity or its standard error: two decimals, or three digits from 10,000 on."""
    return decimals(value, 2) if value is None or value < 1e4 else significant(value)
