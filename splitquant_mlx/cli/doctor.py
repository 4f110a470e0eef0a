"""Offer `doctor`."""

from splitquant_mlx.cli.options import Device, start
from splitquant_mlx.errors import SplitQuantError


def doctor(device: Device = None) -> None:
    """Show device, versions and memory, and check that this machine computes correctly."""
    start(device)
    import mlx.core as mx
    from rich.console import Console
    from rich.table import Table

    from splitquant_mlx.cli.console import size
    from splitquant_mlx.inspection.doctor import devices, dispatch_ratio, self_check
    from splitquant_mlx.runtime import blas
    from splitquant_mlx.runtime.environment import describe_machine, versions

    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    machine = describe_machine()
    table.add_row("machine", f"{machine['chip']}, {machine['cores']} cores, {machine['system']}")
    table.add_row("memory", size(float(machine["memory_bytes"])))
    default = mx.default_device().type.name
    names = ", ".join(found.type.name for found in devices())
    table.add_row("devices", f"{names} (in use: {default})")
    for package, number in versions().items():
        table.add_row(package, number)
    if (found := blas.preload()) is not None:
        table.add_row("OpenBLAS", "loaded" if found else f"missing: {blas.ADVICE}")
    console.print(table)

    checks = self_check()
    results = Table("self-check", "largest difference", "limit", "", box=None, padding=(0, 2, 0, 0))
    for check in checks:
        verdict = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
        results.add_row(check.name, f"{check.difference:.1e}", f"{check.limit:.0e}", verdict)
    console.print(results)
    console.print(f"k separate products take {dispatch_ratio():.2f} x the time of one split layer")
    if failed := [check.name for check in checks if not check.passed]:
        raise SplitQuantError(
            f"self-check failed ({'; '.join(failed)}): results on this machine cannot be trusted; "
            "update mlx, or use --device cpu"
        )
