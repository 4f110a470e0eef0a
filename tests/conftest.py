"""Share fixtures: the real tiny checkpoints, and a converted one."""

from pathlib import Path

import pytest

from splitquant_mlx import blas

blas.preload()

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the directory of test models and texts that are not part of the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no test data beside the repository ({DATA.name})")
    return DATA


@pytest.fixture(scope="session")
def stories(data) -> Path:
    return data / "models" / "stories260K"


@pytest.fixture(scope="session")
def babyllama(data) -> Path:
    return data / "models" / "babyllama-tok105"


@pytest.fixture(scope="session")
def split_stories(stories, tmp_path_factory) -> Path:
    """Return stories260K converted with splitquant at its defaults."""
    from splitquant_mlx import convert

    target = tmp_path_factory.mktemp("converted") / "split"
    convert(stories, target)
    return target
