"""Write checkpoints of well-known shapes with random weights, for benchmarks."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.formats.shard_writer import MAX_SHARD_BYTES, ShardWriter
from splitquant_mlx.models.architecture import build_model, parameters
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.settings import NonNegativeInt, PositiveInt, settings

STANDARD_DEVIATION = 0.02


@settings
class Shape:
    """Sizes of a Llama model, or with experts of a Qwen3 mixture, named as in config.json.

    With experts, `intermediate_size` is the width of one expert.

    Raises:
        RecipeError: when a size is below 1, or not divisible by the number of heads.
    """

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    vocab_size: PositiveInt = 128256
    tie_word_embeddings: bool = False
    num_experts: NonNegativeInt = 0
    num_experts_per_tok: NonNegativeInt = 0

    def __post_init__(self) -> None:
        """Check the divisibility of the sizes."""
        # rotary position embeddings rotate pairs of a head's entries
        if self.hidden_size % (2 * self.num_attention_heads):
            raise RecipeError(
                f"expected a multiple of {2 * self.num_attention_heads}, twice the attention "
                f"heads, got {self.hidden_size}",
                field="hidden_size",
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise RecipeError(
                f"expected a divisor of the {self.num_attention_heads} attention heads, got "
                f"{self.num_key_value_heads}",
                field="num_key_value_heads",
            )

    def config(self, dtype: str) -> dict:
        """Return the content of config.json."""
        sizes = {name: value for name, value in vars(self).items() if "experts" not in name}
        architecture = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if self.num_experts:
            architecture = {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "num_experts": self.num_experts,
                "num_experts_per_tok": self.num_experts_per_tok,
                "moe_intermediate_size": self.intermediate_size,
                "head_dim": self.hidden_size // self.num_attention_heads,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "norm_topk_prob": True,
            }
        return {
            **sizes,
            **architecture,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 8192,
            "torch_dtype": dtype,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors by their names in a published checkpoint."""
        shapes = {}
        for name, array in parameters(build_model(Path("model"), self.config("float32"))).items():
            experts = range(self.num_experts if ".switch_mlp." in name else 0)
            shapes |= {name.replace("switch_mlp", f"experts.{n}"): array.shape[1:] for n in experts}
            if not experts:
                shapes[name] = array.shape
        return shapes


def _llama(hidden: int, inner: int, layers: int, heads: int, tied: bool = False) -> Shape:
    return Shape(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "tiny": Shape(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
    # wide MLPs and a small hidden size: many layers of large tensors with few parameters
    "deep": Shape(
        hidden_size=512,
        intermediate_size=16384,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=256,
    ),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, tied=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, tied=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    # the original has 32 heads of size 128, twice the hidden size in total
    "qwen3-30b-a3b": Shape(
        hidden_size=2048,
        intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=151936,
        num_experts=128,
        num_experts_per_tok=8,
    ),
}


def write_random_checkpoint(
    directory: Path,
    shape: Shape,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = SILENT,
) -> None:
    """Write a checkpoint: normal weights of std 0.02, norms of 1, and a word-level tokenizer.

    Args:
        directory: target directory; must not exist.
        shape: sizes of the model.
        dtype: "float16", "bfloat16" or "float32".
        max_shard_bytes: maximum size of a file, bytes.
        progress: progress reporter.

    Raises:
        RecipeError: when `directory` exists.
    """
    try:
        directory.mkdir(parents=True)
    except FileExistsError as exc:
        raise RecipeError(f"{directory} exists already: give a new directory") from exc
    config = json.dumps(shape.config(dtype), indent=2)
    (directory / "config.json").write_text(config + "\n", encoding="utf-8")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0} | {f"token{i}": i for i in range(1, shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    (directory / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
    mx_dtype = getattr(mx, dtype)
    tensors = {name: (mx_dtype, size) for name, size in shape.tensors().items()}
    rng = np.random.default_rng(0)
    with (
        progress.task("Writing random weights", len(tensors)) as advance,
        ShardWriter(directory, tensors, max_shard_bytes) as writer,
    ):
        for name, (_, size) in tensors.items():
            if len(size) == 1:
                w = mx.ones(size, mx_dtype)
            else:
                values = rng.standard_normal(size, np.float32)
                w = (mx.array(values) * STANDARD_DEVIATION).astype(mx_dtype)
            writer.add(name, w)
            advance(1)
        writer.close()
