"""Time the evaluation of masks by several providers side by side, and add rows to ``results.jsonl``.

python benchmarks/speed/run.py                                     # of a processor, and more than README.md shows
python benchmarks/speed/run.py --model llama2-7b --device cuda     # of a GPU
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.rows import append_row, commit
from benchmarks.speed import models
from benchmarks.speed.providers import NAMES, provider
from bernprune.backends import find_device, keep_freed_memory
from bernprune.errors import BackendError
from bernprune.evaluation.latency import machine
from bernprune.models.shortening import stored_bytes
from bernprune.models.view import ModelView

HERE = Path(__file__).parent
WINDOW = 128
MASKS_OF_WINDOW = 8  # where each window has masks of its own, as many as a run gives it
MASKS_OF_BATCH = 2  # of all windows of a step, as published
TOLERANCE = 2e-2  # of a loss, relative to the twin's in float64


def shapes(per: str, tokens: int) -> tuple[tuple[int, ...], int]:
    """Shape of the masks, and number of windows, of a step of so many tokens under any mask."""
    if per == "batch":
        return (MASKS_OF_BATCH,), tokens // (WINDOW * MASKS_OF_BATCH)
    windows = tokens // (WINDOW * MASKS_OF_WINDOW)
    return (windows, MASKS_OF_WINDOW, 1 if per == "sequence" else 4), windows


def asked_device(name: str) -> torch.device:
    """Or the end, with what is wrong in one sentence."""
    try:
        return find_device(name)
    except BackendError as error:
        sys.exit(f"error: {error}")


def seconds_of(work: Callable[[], Any], device: torch.device, *, least: float) -> list[float]:
    """Of as many repetitions as fill so many seconds, five at least, after one that warms up."""
    times: list[float] = []
    while len(times) < 6 or sum(times) < least:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return times[1:]


def ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of a large product of random matrices."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / statistics.median(seconds_of(lambda: left @ right, device, least=1.0))


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying what no cache holds."""
    size = 2**30 if device.type == "cuda" else 2**28
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
    return 2 * size / statistics.median(seconds_of(lambda: target.copy_(source), device, least=1.0))


def kept_shares(masks: torch.Tensor) -> torch.Tensor:
    """Of all masks, those that keep each unit, float64 ``[U]`` on the CPU."""
    return masks.flatten(0, -2).float().mean(0).double().cpu()


def kept_weights(view: ModelView, masks: torch.Tensor) -> float:
    """Of what a mask keeps on average, and of the output embedding."""
    kept = (kept_shares(masks) * view.space.costs_U()).sum().item()
    return kept + view.model.get_output_embeddings().weight.numel()


def kept_flops(view: ModelView, masks: torch.Tensor, tokens: int) -> float:
    """Of products with ``kept_weights``, for so many tokens in all."""
    return 2.0 * tokens * kept_weights(view, masks)


def kept_bytes(view: ModelView, masks: torch.Tensor, tokens: int, passes: int) -> float:
    """``kept_weights`` once a pass, and what the projections and the output embedding read and write for all tokens."""
    shape, kept_U = view.architecture, kept_shares(masks)
    groups, channels = (
        sum(kept_U[view.space.span(kind, layer)].sum().item() for layer in range(len(view.layers)))
        for kind in ("kv_group", "channel")
    )
    queries = groups * (shape.layers[0].query_heads // shape.layers[0].kv_groups) * shape.head_dim
    # Queries, keys, values, gate and up read the residual stream, the other two write to it; keys and values are
    # written, queries and channels written and read, channels by gate and by up.
    entries = 7 * len(view.layers) * shape.hidden_size + 2 * queries + 2 * groups * shape.head_dim + 3 * channels
    entries += shape.hidden_size + view.model.config.vocab_size
    return view.model.dtype.itemsize * (passes * kept_weights(view, masks) + tokens * entries)


def passes_of(view: ModelView, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """What comes of some work, and how many forward passes it took."""
    passes: list[int] = []
    handle = view.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        return work(), len(passes)
    finally:
        handle.remove()


def twin(view: ModelView, masks: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Losses of the first window, ``[1, K]``, by the model in float64."""
    dtype = view.model.dtype
    view.model.double()
    try:
        with provider("batched", view, rows=64, window=WINDOW) as evaluate:
            return evaluate(masks if masks.ndim == 2 else masks[:1], tokens_BT[:1])
    finally:
        view.model.to(dtype)


def rows(given: argparse.Namespace, model: str) -> None:
    """Of one model: all densities, sizes of a step, ways of masks and providers."""
    device, dtype = asked_device(given.device), getattr(torch, given.dtype)
    view, most = models.build(model, dtype, device, layers=given.layers), ceiling(dtype, device)
    widest = bandwidth(device)
    for density, tokens, per in itertools.product(given.density, given.tokens, given.per):
        shape, windows = shapes(per, tokens)
        masks, tokens_BT = models.masks(view, density, shape).to(device), models.text(view, windows, WINDOW)
        expected = twin(view, masks, tokens_BT) if model in given.checked else None
        for name in given.provider:
            if name == "published" and per == "chunk":
                continue  # it knows no such masks
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with provider(name, view, rows=tokens // WINDOW, window=WINDOW) as evaluate:
                found, passes = passes_of(view, lambda: evaluate(masks, tokens_BT))  # noqa: B023
                error = None if expected is None else ((found[:1].cpu() - expected) / expected).abs().max().item()
                if error is not None and not error <= TOLERANCE:
                    raise SystemExit(f"{name} on {model}: losses are off by {error:.2g}; it is not timed")
                times = seconds_of(lambda: evaluate(masks, tokens_BT), device, least=given.seconds)  # noqa: B023
            tenths, median = statistics.quantiles(times, n=10), statistics.median(times)
            flops, moved = kept_flops(view, masks, tokens), kept_bytes(view, masks, tokens, passes)
            row = {
                "model": model, "layers": len(view.layers), "dtype": given.dtype, "density": density, "tokens": tokens,
                "masks_per": per, "provider": name, "median": median, "low": tenths[1], "high": tenths[7],
                "repeats": len(times), "tokens_per_second": tokens / median, "passes": passes,
                "kept_flops": flops, "ceiling": most, "of_ceiling": flops / median / most,
                "kept_bytes": moved, "bandwidth": widest, "of_bandwidth": moved / median / widest,
                "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
                "weight_bytes": stored_bytes(view.model), "error": error,
                "machine": machine(device), "commit": commit(),
            }  # fmt: skip
            append_row(given.folder / "results.jsonl", row)
            print(
                f"{model:<12} density {density:<4} {tokens:>6} tokens, masks per {per:<8} {name:<11}"
                f"{1e3 * row['median']:>10.1f} ms ({1e3 * row['low']:.1f} to {1e3 * row['high']:.1f})"
                f"{row['tokens_per_second']:>12,.0f} tokens/s {row['of_ceiling']:>6.1%} of the ceiling"
                f"{row['of_bandwidth']:>6.1%} of the bandwidth",
                flush=True,
            )


def main() -> None:
    """Parse, and time one model after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=models.NAMES, default=models.SMALL)
    parser.add_argument("--checked", nargs="*", choices=models.NAMES, default=models.SMALL)
    parser.add_argument("--provider", nargs="+", choices=NAMES, default=NAMES[:3])
    parser.add_argument("--density", nargs="+", type=float, default=[0.3, 0.5, 0.7, 1.0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192], help="of a step, under all masks")
    parser.add_argument("--per", nargs="+", choices=["batch", "sequence", "chunk"], default=["batch", "sequence"])
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of repetitions, at least")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=HERE, help="where results.jsonl lies")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as the command line does
    for model in given.model:
        if reason := models.missing(model):
            print(f"{model} is skipped: {reason}")
        else:
            rows(given, model)


if __name__ == "__main__":
    main()
