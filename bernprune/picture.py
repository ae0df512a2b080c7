"""A run at a glance: what each layer keeps, and how the losses fell of sampled masks and of what would be selected."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from bernprune.report import shown, titles

_COLOURS = {"kv_groups": "#3b6ea5", "channels": "#d98032"}
_TITLES = {"kv_groups": "kv groups", "channels": "FFN channels"}


def draw(report: dict[str, Any], records: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of the report of a run and the losses in the records of its steps, nats per token."""
    from matplotlib.figure import Figure  # takes a second, and most of the library never draws

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    kept, learning = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_layers(kept, report["layers"])
    _draw_losses(learning, records)
    perplexity = {name: shown(value, 2) for name, value in report["perplexity"].items()}
    figure.suptitle(
        f"{report['sparsity']['block_parameters']:.1%} of block parameters removed: perplexity {perplexity['dense']} "
        f"dense, {perplexity['initial']} initial metric, {perplexity['pruned']} {titles(report)['pruned']}"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_layers(axes: Any, layers: Sequence[dict[str, int]]) -> None:
    positions = np.arange(len(layers))
    for offset, kind in ((-0.2, "kv_groups"), (0.2, "channels")):
        shares = [layer[kind] / layer[f"of_{kind}"] for layer in layers]
        axes.bar(positions + offset, shares, 0.38, color=_COLOURS[kind], label=_TITLES[kind])
    axes.set(xlabel="layer", ylabel="share kept", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)


def _draw_losses(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    axes.set(xlabel="step", ylabel="nats per token", title="loss while learning")
    if not records:
        axes.text(0.5, 0.5, "no search", ha="center", transform=axes.transAxes)
        return
    losses = [record["loss"] for record in records]
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(losses, color="#cccccc", linewidth=0.6)
    axes.plot(np.arange(len(smooth)) + width // 2, smooth, color="#222222", linewidth=1.2, label="sampled masks")
    probed = {
        step: record["round"]["selected_loss"]
        for step, record in enumerate(records)
        if "selected_loss" in record.get("round", {})
    }
    if probed:
        axes.plot(list(probed), list(probed.values()), ".", color="#d98032", label="selected")
        axes.legend(frameon=False)
