"""Kernels compile for GPUs that need not be there: with room for their tiles, and products on matrix units.

Those that multiply; the others, which are the same for all, for one of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
PLAIN = {"_to_kept_kernel", "_hidden_kernel"}  # which read weights and inputs only, and nothing twice
TILES_BYTES = 2 * (128 + 128) * 64  # of the inputs and weights that one multiplication of theirs takes
PRODUCTS = {"_masked_kernel", "_from_kept_kernel", "_to_kept_kernel", "_hidden_kernel", "_attention_kernel"}
OTHERS = {
    "_draw_kernel", "_list_kernel", "_activation_kernel", "_cross_entropy_kernel", "_divergence_kernel",
    "_score_kernel", "_dot_kernel", "_activity_kernel", "_rotary_kernel", "_cut_kernel",
}  # fmt: skip


CAPABILITIES = {"A100": 80, "RTX": 89, "H100": 90, "B200": 100}
IN_FULL = CAPABILITIES["H100"]


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What was found of each kernel for each card, in a process that does not interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, str(TESTS / "compile_kernels.py"), str(IN_FULL), *map(str, CAPABILITIES.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", CAPABILITIES.values(), ids=CAPABILITIES)
def test_every_kernel_compiles(capability: int, compiled: list[dict[str, Any]]) -> None:
    found = [report for report in compiled if report["capability"] == capability]
    assert {report["kernel"] for report in found} == (PRODUCTS | OTHERS if capability == IN_FULL else PRODUCTS)
    assert {report["kernel"] for report in found if report["matrix_units"]} == PRODUCTS
    assert all(report["shared"] <= report["room"] for report in found), found
    ahead = {report["kernel"]: report["stages"] for report in found if report["kernel"] in PRODUCTS}
    assert min(ahead.values()) >= 2, "what is multiplied next is on its way"
    rooms = [report["shared"] for report in found if report["kernel"] in PLAIN]
    assert min(rooms) >= 2 * TILES_BYTES, "and not in the place of what is multiplied now"
