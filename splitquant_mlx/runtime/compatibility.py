"""Check that the installed mlx, mlx-lm and transformers are compatible with this package.

Each has a minimum version. This package also uses names of mlx-lm outside its documented API; a
release without one of them is refused before the module is used.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter

from splitquant_mlx._version import __version__
from splitquant_mlx.errors import VersionError

# as in pyproject.toml
OLDEST = {"mlx": "0.31.2", "mlx-lm": "0.31.3", "transformers": "5.6"}
# undocumented names of mlx-lm that this package calls, replaces or overrides
NAMES = {
    "mlx_lm.utils": ("_get_classes",),
    "mlx_lm.generate": (
        "BatchGenerator.insert",
        "BatchGenerator.next",
        "BatchGenerator.remove",
        "stream_generate",
    ),
    "mlx_lm.models.cache": (
        "LRUPromptCache.fetch_nearest_cache",
        "LRUPromptCache.insert_cache",
        "can_trim_prompt_cache",
        "make_prompt_cache",
        "trim_prompt_cache",
    ),
    "mlx_lm.sample_utils": ("make_logits_processors", "make_sampler"),
    "mlx_lm.tokenizer_utils": (
        "TokenizerWrapper.detokenizer",
        "TokenizerWrapper.eos_token_ids",
        "TokenizerWrapper.has_thinking",
        "TokenizerWrapper.has_tool_calling",
        "TokenizerWrapper.think_end",
        "TokenizerWrapper.think_start",
        "TokenizerWrapper.tool_call_end",
        "TokenizerWrapper.tool_call_start",
        "TokenizerWrapper.tool_parser",
    ),
}


def check_versions() -> None:
    """Raise VersionError when an installed package is older than its minimum."""
    from packaging.version import Version

    for package, oldest in OLDEST.items():
        installed = _installed(package)
        # ignore suffixes: a development version of 0.32.0 is accepted as 0.32.0
        if installed and Version(installed).release < Version(oldest).release:
            raise VersionError(
                f"{package}: expected version {oldest} or later for splitquant-mlx {__version__}, "
                f"got {installed}: pip install -U {package}"
            )


def check_names(module: str) -> None:
    """Raise VersionError when a module of mlx-lm lacks one of its `NAMES`."""
    check_versions()
    for name in NAMES[module]:
        try:
            attrgetter(name)(import_module(module))
        except (ImportError, AttributeError) as exc:
            raise VersionError(
                f"mlx-lm {_installed('mlx-lm')} has no {module}.{name}, which splitquant-mlx "
                f"{__version__} uses: update splitquant-mlx (in its clone: git pull && "
                f'pip install .), or pip install "mlx-lm=={OLDEST["mlx-lm"]}"'
            ) from exc


@cache
def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a local build may be importable without metadata
        return None
