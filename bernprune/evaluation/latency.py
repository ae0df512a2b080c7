"""Time of a forward pass, as measured here and now."""

import platform
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bernprune.costs import timed
from bernprune.models.products import plain_products

_ENOUGH = 20.0  # seconds


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass over ``rows`` windows: median, and the 20th and 80th percentile."""

    median_ms: float
    low_ms: float
    high_ms: float
    rows: int
    window: int
    repeats: int
    machine: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def latency(model: Any, tokens_RT: torch.Tensor, *, repeats: int = 20, warmup: int = 3) -> Latency:
    """Prefill latency of a batch, logits of the last token only, without cache, in the model's dtype on its device.

    A model that takes long is timed less often than ``repeats``, twice at least.
    """
    device = model.device
    tokens_RT = tokens_RT.to(device)

    def run(_: int) -> None:
        model(input_ids=tokens_RT, use_cache=False, logits_to_keep=1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with plain_products():
        times = [1e3 * seconds for seconds in timed(run, repeats, _ENOUGH, warmup=warmup, least=2)]
    tenths = statistics.quantiles(times, n=10, method="inclusive")  # never outside what was measured
    return Latency(
        median_ms=round(statistics.median(times), 3),
        low_ms=round(tenths[1], 3),
        high_ms=round(tenths[7], 3),
        rows=tokens_RT.shape[0],
        window=tokens_RT.shape[1],
        repeats=len(times),
        machine=machine(device),
    )


def machine(device: torch.device) -> str:
    """The machine in words, without its name."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    instructions = torch.backends.cpu.get_cpu_capability()  # without them, times of two processors tell nothing
    return f"{platform.machine()} CPU ({instructions}), {torch.get_num_threads()} threads, torch {torch.__version__}"
