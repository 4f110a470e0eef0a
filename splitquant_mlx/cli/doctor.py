"""The command `doctor`."""

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated

import typer

from splitquant_mlx.cli import console, lm_studio
from splitquant_mlx.cli.console import new_table, pairs, plain, show, size
from splitquant_mlx.cli.options import Device, JsonFile, start
from splitquant_mlx.errors import SplitQuantError


def doctor(
    json_file: JsonFile = None,
    device: Device = None,
    architectures: Annotated[
        bool, typer.Option(help="List how mlx-lm's architectures compare with transformers'.")
    ] = False,
) -> None:
    """Show device, versions, memory and disk, and check that this machine computes correctly."""
    if architectures:
        return _show_architectures(json_file)
    start(device)
    from splitquant_mlx.inspection.doctor import dispatch_ratio, self_check

    facts, checks = _facts(), self_check()
    facts["split layers"] = f"fused, {dispatch_ratio():.2f} x as fast as separate parts"
    values = {"facts": facts, "checks": [dataclasses.asdict(c) | {"ok": c.passed} for c in checks]}
    if not console.write_json(json_file, values):
        table = new_table("", "largest difference", "limit", "")
        for check in checks:
            verdict = "ok" if check.passed else "FAILED"
            table.add_row(check.name, f"{check.difference:.1e}", f"{check.limit:.0e}", verdict)
        show(pairs(*facts.items()), "", table, "")
    if failed := [check.name for check in checks if not check.passed]:
        raise SplitQuantError(
            f"self-check failed ({'; '.join(failed)}): results on this machine are unreliable; "
            "update mlx, or use --device cpu"
        )
    if json_file != "-":
        show("Everything works.")


def _facts() -> dict[str, str]:
    """Return properties of the machine and the software, by label."""
    import mlx.core as mx
    from huggingface_hub import constants, get_token

    from splitquant_mlx.inspection.doctor import devices
    from splitquant_mlx.runtime import blas
    from splitquant_mlx.runtime.cache import cache_directory
    from splitquant_mlx.runtime.environment import describe_machine, versions
    from splitquant_mlx.runtime.memory import free_bytes, memory_bytes

    machine = describe_machine()
    facts = {
        "machine": f"{machine['chip']}, {machine['cores']} cores, {machine['system']}",
        "memory": f"{size(memory_bytes())}, {size(free_bytes())} free",
    }
    if limit := mx.device_info().get("max_recommended_working_set_size"):
        facts["memory for the GPU"] = size(float(limit))
    default = mx.default_device().type.name
    names = ", ".join(device.type.name for device in devices())
    facts["devices"] = f"{names} (in use: {default})"
    facts["disk here"] = f"{size(shutil.disk_usage(Path.cwd()).free)} free"
    facts["caches"] = f"{cache_directory()}; hub: {constants.HF_HUB_CACHE}"
    no_token = "none (hf auth login, for gated and private repos)"
    facts["hub login"] = "token found" if get_token() else no_token
    models = lm_studio.HOME.expanduser()
    facts["LM Studio"] = f"models in {models}" if models.is_dir() else "not found"
    facts |= versions()
    if (loaded := blas.preload()) is not None:
        facts["OpenBLAS"] = "loaded" if loaded else f"missing: {blas.ADVICE}"
    return {name: plain(value) for name, value in facts.items()}


def _show_architectures(json_file: JsonFile) -> None:
    from splitquant_mlx.inspection.architectures import recorded, rows

    comparisons = recorded()
    if console.write_json(json_file, dataclasses.asdict(comparisons)):
        return
    table = new_table("", "variant", "verdict", "difference", "8 bits")
    remarks = []
    for *cells, remark in rows(comparisons):
        table.add_row(*map(plain, cells))
        if remark:
            remarks.append(plain(f"{cells[0]} ({cells[1]}): {remark}"))
    versions = ", ".join(f"{name} {number}" for name, number in comparisons.versions.items())
    show(table, "", *remarks, "", f"Compared with transformers; versions: {versions}.")
