"""Estimates of a conversion's peak memory; slow tests compare them with real conversions."""

import pytest

from splitquant_mlx import Recipe
from splitquant_mlx.bench.programs import OURS, run_program
from splitquant_mlx.inspection import conversion_memory
from splitquant_mlx.inspection.conversion_memory import converting_bytes
from splitquant_mlx.models.compact import SLICE
from splitquant_mlx.models.footprint import tensor_sizes
from splitquant_mlx.recipe import Calibration


def llama(layers, hidden=4096, vocabulary=128_256):
    """Return the tensor sizes of a Llama, in entries; by default the widths of Llama 8B."""
    block = {f"self_attn.{name}_proj": hidden * hidden for name in "qo"}
    block |= {f"self_attn.{name}_proj": hidden * hidden // 4 for name in "kv"}
    block |= {f"mlp.{name}_proj": hidden * hidden * 7 // 2 for name in ("gate", "up", "down")}
    sizes = {"model.norm.weight": hidden, "lm_head.weight": hidden * vocabulary}
    sizes["model.embed_tokens.weight"] = hidden * vocabulary
    for i in range(layers):
        sizes |= {f"model.layers.{i}.{name}.weight": n for name, n in block.items()}
    return sizes


def test_no_method_needs_the_whole_original_in_float():
    small, large = llama(32), llama(320)
    for method in ("rtn", "splitquant", "imatrix", "gptq"):
        assert converting_bytes(small, Recipe(method=method)) < 2 * sum(small.values())
    rtn = Recipe(method="rtn")
    assert converting_bytes(small, rtn) == converting_bytes(large, rtn)
    gptq = Recipe(method="gptq")  # samples text from an 8-bit copy
    assert converting_bytes(large, gptq) > sum(large.values())


def test_more_calibration_and_refinement_need_more_memory():
    sizes = llama(16, hidden=1024)
    few, many = (
        Recipe(method="imatrix", calibration=Calibration(num_samples=n)) for n in (16, 128)
    )
    assert converting_bytes(sizes, few) < converting_bytes(sizes, many)
    plain, refined = (Recipe(method="rtn", refine=refine) for refine in (False, True))
    assert converting_bytes(sizes, plain) < converting_bytes(sizes, refined)


def test_each_core_has_a_slice_of_the_copy_in_float32(monkeypatch):
    estimates = []
    for cores in (1, 4):
        monkeypatch.setattr(conversion_memory, "cores", lambda cores=cores: cores)
        estimates.append(converting_bytes(llama(320), Recipe(method="gptq")))
    assert estimates[1] - estimates[0] == 3 * 4 * SLICE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "splitquant", "imatrix", "gptq"])
def test_the_estimate_matches_a_real_conversion(smollm2, text_file, tmp_path, method):
    command = [*OURS, "convert", str(smollm2), "--method", method, "--device", "cpu"]
    calibration = None
    if method in ("imatrix", "gptq"):
        calibration = Calibration(num_samples=16, text=str(text_file))
        command += ["--calibration", str(text_file), "--num-samples", "16"]
    run = run_program([*command, "--mlx-path", str(tmp_path / "out")])
    estimated = converting_bytes(
        tensor_sizes(smollm2), Recipe(method=method, calibration=calibration)
    )
    print(f"{method}: estimated {estimated / 1e6:.0f} MB, took {run.peak_bytes / 1e6:.0f} MB")
    assert 0.75 < estimated / run.peak_bytes < 1.5
