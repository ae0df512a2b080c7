"""The most memory that something takes: what benchmarks of scores, repair and recovery measure."""

import ctypes
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


class Peak:
    """The most memory that was taken beyond what was held at the start, in MiB: of the process, or of the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = float(torch.cuda.memory_allocated(device)) / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self._before = _status("VmRSS")

    def mib(self) -> float:
        """So far."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device)) / 2**20 - self._before
        return _status("VmHWM") - self._before


def _status(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def mean_peak(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean of the rows' peaks in MiB, for a table; nothing where there are none, or older ones that do not say."""
    found = [row.get("peak_mib") for row in rows]
    return f"{statistics.fmean(found):.0f}" if found and None not in found else ""
