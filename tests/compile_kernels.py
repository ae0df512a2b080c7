"""Run by itself: compiles kernels for GPUs that need not be there, and prints what it found as JSON lines.

    python tests/compile_kernels.py 90 80 89 90    # every kernel for capability 90; for the others those that multiply

The interpreter is lenient where the compiler is not. All is as for a launch, but for the launch.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, get_args

import torch
import triton
from kernel_cases import MASKS, listed, packed
from spaces import FLAT
from test_masks import make_masks
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bernprune.kernels import attention, draw, linear, losses, mlp, rotary, sums, tiles
from bernprune.policy.masks import Design

# Bytes that a block of threads may have, by capability.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CPU = torch.device("cpu")


class Absent:
    """A GPU of a capability that can be compiled for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # what is compiled for another is not taken for this one's

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int, in_full: bool) -> None:
    """Call operations with kernels, with every launch replaced."""
    driver.set_active(Absent(capability))
    card = tiles.Card(SHARED[capability], tiles.idle_stages(capability // 10))
    tiles.card_of = attention.card_of = lambda device: card
    launch = triton.JITFunction.run

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found = launch(kernel, *args, grid=grid, warmup=True, **options)
        matrix_units = any(name in found.asm["ptx"] for name in ("tcgen05.mma", "wgmma", "mma.sync"))
        report = {
            "capability": capability,
            "kernel": kernel.__name__,
            "shared": found.metadata.shared,
            "matrix_units": matrix_units,
            "stages": found.metadata.num_stages,
        }
        sys.stdout.write(json.dumps({**report, "room": SHARED[capability]}) + "\n")
        return found

    triton.JITFunction.run = compiled
    try:
        for call in operations(in_full):
            call()
    finally:
        triton.JITFunction.run = launch


def operations(in_full: bool) -> list[Callable[[], Any]]:
    """Calls with kernels that multiply, in bfloat16, and wide enough for full tiles; or with all, and all variants."""
    masks_MN = MASKS["random"](2, 128)
    bits, kept = packed(masks_MN, CPU), listed(masks_MN, CPU)
    probs_U = torch.full((FLAT.size,), 0.5, dtype=torch.float64)
    draws = make_masks(probs_U, Design(1, 2, 1, "antithetic", swing=0.5)).drawn()

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    small, narrow, wide = zeros(2, 8, FLAT.size), zeros(4, 128, 128), zeros(4, 128, 128 * 128)
    weight, heads, larger = zeros(256, 128), zeros(4, 128, 128, 128), zeros(4, 128, 128, 256)

    def of_units(width: int) -> torch.Tensor:
        x, outputs = zeros(4, 128, 128 * width), zeros(256, 128 * width)
        return linear.masked_linear(x, bits, outputs, unit_width=width)

    calls = [
        lambda: of_units(128),
        lambda: linear.linear_from_kept(wide, kept, zeros(256, 128 * 128), unit_width=128),
        lambda: linear.linear_to_kept(narrow, bits, zeros(128 * 128, 128), unit_width=128),
        lambda: mlp.hidden_of_kept(narrow, kept, weight[:128], weight[128:], activation="silu"),
        lambda: attention.attention_of_kept(heads, heads, heads, bits),
        lambda: attention.attention_of_kept(larger, larger, larger, bits),
    ]
    if in_full:
        calls += [
            lambda: draw.draw(draws),
            lambda: draw.list_kept(bits),
            lambda: linear.cut(narrow, bits),
            lambda: rotary.rotary(heads, heads[:1, 0], heads[:1, 1]),
            lambda: losses.cross_entropy(zeros(2, 32000), torch.zeros(2, dtype=torch.int64)),
            lambda: losses.divergence(zeros(2, 32000), zeros(2, 32000)),
            lambda: sums.score_sums(torch.zeros(1, 2), draws, probs_U),
            lambda: sums.kept_sums(probs_U, draws),
            lambda: sums.activity_sums(small[:1], torch.zeros(1, 2, 8), draws),
            *(lambda width=width: of_units(width) for width in (1, 3, 80)),
            lambda: linear.masked_linear(small, draws, zeros(256, FLAT.size)),
            lambda: linear.linear_from_kept(narrow, kept, weight, compact=True),
            *(lambda name=name: mlp.masked_activation(small, small, draws, name) for name in get_args(mlp.Activation)),
            lambda: attention.attention_of_kept(heads.float(), heads.float(), heads.float(), bits),
        ]
    return calls


if __name__ == "__main__":
    every, *capabilities = map(int, sys.argv[1:])
    for capability in capabilities:
        compile_all(capability, capability == every)
