"""Curves of faithfulness as one picture: a column for each way of removing, a row for each order."""

import io
from collections.abc import Mapping

Curves = Mapping[str, Mapping[str, list[float | None]]]  # by name: "share" with "top1" and "chance", or "blocks" with "correlation"

PANELS = {"zero": "black", "tokens": "tokens dropped", "road": "ROAD", "blur": "blurred"}
ORDERS = {"positive": "most relevant first", "negative": "least relevant first"}


def curves_png(by_method: Mapping[str, Curves]) -> bytes:
    """Top-1 (solid) and probability (dotted) of the explained class while parts go; and rank correlations with maps of random models."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = {name for curves in by_method.values() for name in curves}
    panels = [panel for panel in PANELS if f"{panel}_positive" in names]
    columns = len(panels) + ("randomised" in names)
    figure = Figure(figsize=(3 * max(columns, 2), 6), dpi=100, layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for line, (method, curves) in enumerate(by_method.items()):
        style = {"color": colormaps["tab20"](2 * line % 20 + line // 10 % 2), "linewidth": 1.2}
        for column, panel in enumerate(panels):
            for row, order in enumerate(ORDERS):
                curve = curves[f"{panel}_{order}"]
                share = [100 * (value or 0) for value in curve["share"]]
                axes[row][column].plot(share, curve["top1"], label=method, **style)
                axes[row][column].plot(share, curve["chance"], linestyle=":", **style)
        if "randomised" in curves:
            found = curves["randomised"]
            points = [(x, y) for x, y in zip(found["blocks"], found["correlation"], strict=True) if y is not None]
            axes[0][-1].plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=method, **style)
    for column, panel in enumerate(panels):
        for row, order in enumerate(ORDERS.values()):
            axes[row][column].set(title=f"{PANELS[panel]}, {order}", xlabel="removed, %", ylim=(-0.03, 1.03))
    if "randomised" in names:
        axes[0][-1].set(title="rank correlation", xlabel="last blocks random", ylim=(-1.03, 1.03))
        axes[1][-1].axis("off")
    figure.suptitle("explained class: named first (solid), its probability (dotted)", fontsize=9)
    for one in figure.axes:
        one.title.set_fontsize(9)
        one.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, max(1, len(labels))), fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
