"""The whole job on a real chat model of 135 million parameters."""

import mlx.core as mx
import pytest
from offgrid import make_offgrid

from splitquant_mlx import Recipe, convert, load
from splitquant_mlx.evaluation.divergence import divergence, log_probabilities
from splitquant_mlx.models.dense import dequantize_model
from splitquant_mlx.models.loader import load_model

pytestmark = pytest.mark.slow

CONTEXT = 512
CHUNKS = 3


@pytest.fixture(scope="module")
def reference(smollm2, tmp_path_factory):
    return make_offgrid(smollm2, tmp_path_factory.mktemp("offgrid") / "reference")


def test_divergence_of_split_to_rtn_is_the_published_effect(reference, story_text, tmp_path):
    """Linear layers only, on text no method has seen."""
    model, tokenizer = load(reference)
    tokens = tokenizer.encode(story_text)[: CONTEXT * CHUNKS]
    chunks = [tokens[i : i + CONTEXT] for i in range(0, CONTEXT * CHUNKS, CONTEXT)]
    assert len(chunks[-1]) == CONTEXT
    wanted = [log_probabilities(model, chunk) for chunk in chunks]
    mx.eval(wanted)
    found = {}
    for method in ("rtn", "splitquant"):
        recipe = Recipe(method=method, dtype="float16", embeddings="keep")
        manifest = convert(reference, tmp_path / method, recipe=recipe)
        bits = {"rtn": 4.5, "splitquant": 13.5}[method]
        assert manifest.linear_bits_per_weight == pytest.approx(bits, abs=0.1)
        quantized = dequantize_model(load_model(tmp_path / method))
        found[method] = divergence(wanted, (log_probabilities(quantized, c) for c in chunks))
    ratio = found["splitquant"].kl_mean / found["rtn"].kl_mean
    print(f"\nKL splitquant / rtn = {ratio:.3f}: {found}")
    assert 0.09 < ratio < 0.15
    assert found["splitquant"].top1_agreement > found["rtn"].top1_agreement


def test_split_model_answers_sensibly(smollm2, tmp_path):
    from mlx_lm import generate

    convert(smollm2, tmp_path / "split")
    model, tokenizer = load(tmp_path / "split")
    dequantize_model(model)
    question = [{"role": "user", "content": "Give me three tips for staying healthy."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    answer = generate(model, tokenizer, prompt, max_tokens=60)
    assert any(word in answer.lower() for word in ("diet", "sleep", "water", "exercise"))
    assert len(set(answer.split())) > 20
