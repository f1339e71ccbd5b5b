"""Print docs/published.md: published accuracies of token merging without training, from published.json.

python benchmarks/published_page.py > docs/published.md
"""

from fcvit_jax.evaluation.published import curves


def as_markdown() -> str:
    """Format every point beside the multiply-accumulates that this library counts."""
    lines = [_HEAD]
    lines += [
        f"- `{s.name}`: {s.authors}, {s.where}. {s.how}." + (f" {s.device}." if s.device else "")
        for s in dict.fromkeys(curve.source for curve in curves())
    ]
    for model in dict.fromkeys(curve.model for curve in curves()):
        lines += ["", f"## {model}", ""]
        lines += [
            "| schedule | top-1, % | images/s | GMACs, published | GMACs, computed | source |",
            "|---|---|---|---|---|---|",
        ]
        for curve in curves(model):
            for point in curve.points:
                name = f"`{point.schedule}`" if point.schedule else f"{curve.family}, rate unknown"
                computed = f"{curve.gmacs(point):.2f}" if point.schedule else "-"
                cells = (_number(point.top1), _number(point.images_per_second), _number(point.gmacs))
                lines.append(f"| {name} | {' | '.join(cells)} | {computed} | `{curve.source.name}` |")
        lines += [f"\n`{curve.family}`: {curve.note}" for curve in curves(model) if curve.note]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


_HEAD = """\
# Published accuracies

What others report for token merging without training, on the 50,000 ImageNet-1k validation images. Nothing on this page
was measured with this library. The column "computed" has the multiply-accumulates / 1e9 of one image that it counts for
the same schedule. Made by `python benchmarks/published_page.py` from `fcvit_jax/evaluation/published.json`.

Measure the same schedules yourself with [configs/paper_vit_s.py](../configs/paper_vit_s.py), `paper_vit_b.py`,
`paper_vit_l.py`, `paper_deit_s.py` and `paper_vit_b_sam.py`; the reports show the published top-1 beside the measured,
and the digitised curves behind the plot.

Sources:
"""

if __name__ == "__main__":
    print(as_markdown(), end="")
