"""Give access to any source as a Hugging Face directory; GGUF files are unpacked into one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitquant_mlx.models.source import Source
from splitquant_mlx.progress import SILENT, Progress


@contextmanager
def as_directory(
    source: Source, progress: Progress = SILENT, scratch: Path | None = None
) -> Iterator[Path]:
    """Yield a directory of config.json, safetensors and tokenizer files.

    Args:
        source: a resolved source.
        progress: progress reporter of the unpacking of a GGUF file.
        scratch: parent of the directory for an unpacked GGUF file (up to 4 times its size, removed
            at the end); None is the system's temporary directory.
    """
    if source.path.is_dir():
        yield source.path
        return
    from splitquant_mlx.models.gguf_import import import_gguf

    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=scratch) as unpacked:
        import_gguf(source.path, Path(unpacked), progress)
        yield Path(unpacked)
