"""Write the README's table of the demo from docs/demo.json, which the demo wrote.

    splitquant-mlx demo && cp <cache>/demo/demo.json docs/ && python docs/figures.py

With --check nothing is written; the exit code says whether the README is up to date.
"""

import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
MARKS = re.compile(r"(<!-- demo: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)


def table(demo: dict) -> str:
    """Return the demo's results as a Markdown table; speeds as a ratio to plain INT4's."""
    results = demo["results"]
    plain = next(result for result in results if result["method"] == "rtn 4-bit")
    lines = [
        "| | bits/weight | size, MB | KL divergence, nats | top-1 agreement | time a token |",
        "|---|---|---|---|---|---|",
    ]
    for result in results[1:]:
        found = result["divergence"]
        cells = (
            result["method"],
            f"{result['bits_per_weight']:.1f}",
            f"{result['nbytes'] / 1e6:.0f}",
            f"{found['kl_mean']:.3f}",
            f"{found['top1_agreement']:.0%}",
            f"{plain['tokens_per_s'] / result['tokens_per_s']:.1f} x",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Bring the README up to date, or check that it is."""
    readme = DOCS.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    demo = json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))
    wanted = MARKS.sub(lambda marks: marks[1] + table(demo) + marks[2], text)
    if "--check" in sys.argv:
        sys.exit(None if wanted == text else "README.md: run python docs/figures.py")
    readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
