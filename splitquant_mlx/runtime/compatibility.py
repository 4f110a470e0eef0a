"""Refuse versions of mlx, mlx-lm and transformers that this package cannot work with.

One that is too old is told by its number. And of mlx-lm more is used here than it promises to keep:
a release that no longer has one of these names is refused before anything relies on it.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter

from splitquant_mlx._version import __version__
from splitquant_mlx.errors import VersionError

# as in pyproject.toml
OLDEST = {"mlx": "0.31.2", "mlx-lm": "0.31.3", "transformers": "5.6"}
# of mlx-lm, what is called, replaced or overridden without being part of its documented API
NAMES = {
    "mlx_lm.utils": ("_get_classes",),
    "mlx_lm.models.cache": (
        "LRUPromptCache.fetch_nearest_cache",
        "can_trim_prompt_cache",
        "trim_prompt_cache",
    ),
    "mlx_lm.server": (
        "APIHandler._set_completion_headers",
        "APIHandler.do_GET",
        "APIHandler.do_POST",
        "GenerationContext.stop",
        "ModelProvider.load",
        "ModelProvider.load_default",
        "ResponseGenerator._generate",
        "ResponseGenerator._tokenize",
        "Thread",
        "TimeBudget",
        "argparse.ArgumentParser",
        "get_system_fingerprint",
        "load",
        "main",
        "run",
    ),
}


def check_versions() -> None:
    """Raise VersionError when an installed package is older than what this one needs."""
    for package, oldest in OLDEST.items():
        found = _installed(package)
        if found and _numbers(found) < _numbers(oldest):
            raise VersionError(
                f"{package} {found} is too old: splitquant-mlx {__version__} needs {oldest} or "
                f"later: pip install -U {package}"
            )


def check_names(module: str) -> None:
    """Raise VersionError when a module of mlx-lm has not all names that are used of it."""
    check_versions()
    for name in NAMES[module]:
        try:
            attrgetter(name)(import_module(module))
        except (ImportError, AttributeError) as exc:
            raise VersionError(
                f"mlx-lm {_installed('mlx-lm')} has no {module}.{name}, which splitquant-mlx "
                f"{__version__} uses: pip install -U splitquant-mlx, or "
                f'pip install "mlx-lm=={OLDEST["mlx-lm"]}", which has it'
            ) from exc


@cache
def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # it may be there all the same, from a build of one's own
        return None


def _numbers(text: str) -> list[int]:
    """Return the leading numbers of a version: 0.32.0.dev1 is 0.32.0 here."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return numbers
