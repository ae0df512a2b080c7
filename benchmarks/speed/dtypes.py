"""What a search gains by a shorter number format, and whether masks keep their order in it; prints a line for each.

python benchmarks/speed/dtypes.py

A step is 8 windows of 128 tokens under 8 masks for each of their 4 chunks. Its time is that of the processor, of one
thread, so that whatever else runs on the machine counts little. Losses of 64 masks on the same 8 windows are compared
with those of the model in float32.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.speed import models
from bernprune.backends import keep_freed_memory
from bernprune.models.loading import load_model
from bernprune.models.products import quick_products
from bernprune.models.shortening import shorten
from bernprune.models.view import ModelView, describe
from bernprune.objective import masked_objective

NAMES, DTYPES = ["embedded", *models.SMALL], ["float32", "bfloat16", "int8"]
REPEATS, COMPARED = 5, 64
WINDOWS, WINDOW, MASKS, CHUNKS = 8, 128, 8, 4  # of a step
KEPT = 0.7


def build(name: str, dtype: str) -> ModelView:
    """A model in float32, shortened."""
    if name == "embedded":
        view = describe(load_model(name, dtype="float32"))
    else:
        view = models.build(name, torch.float32, torch.device("cpu"))
    if dtype != "float32":
        shorten(view.model, dtype)
    return describe(view.model)


def measure(view: ModelView) -> tuple[list[float], torch.Tensor]:
    """Seconds of each step after one that warms up, and the losses of masks."""
    tokens_BT, masks_BKCU = models.text(view, WINDOWS, WINDOW), models.masks(view, KEPT, (WINDOWS, MASKS, CHUNKS))
    times: list[float] = []
    with quick_products(view.device, view.model.dtype), masked_objective(view) as objective:
        for _ in range(1 + REPEATS):
            started = time.process_time()
            objective.token_shares(masks_BKCU, tokens_BT)
            times.append(time.process_time() - started)
        return times[1:], objective.losses(models.masks(view, KEPT, (COMPARED,)), tokens_BT)


def main() -> None:
    """Parse, and compare the formats of one model after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=NAMES, default=["embedded", "llama-25m"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES[1:], default=DTYPES[1:])
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for model in given.model:
        exact_K = None
        for dtype in [DTYPES[0], *given.dtype]:
            times, losses_K = measure(build(model, dtype))
            exact_K = losses_K if exact_K is None else exact_K
            speed, differences_K = WINDOWS * MASKS * WINDOW / statistics.median(times), losses_K - exact_K
            correlation = torch.corrcoef(torch.stack([losses_K, exact_K]))[0, 1].item()
            print(
                f"{model:<14}{dtype:<10}{speed:>9,.0f} tokens a second ({min(times):.2f} to {max(times):.2f} s), "
                f"losses differ by {differences_K.std().item():.1e} of a spread of {exact_K.std().item():.1e}, "
                f"correlation {correlation:.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
