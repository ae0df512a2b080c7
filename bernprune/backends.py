"""Which implementation of the masked operations runs, and on which device."""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bernprune.errors import BackendError
from bernprune.kernels import reference
from bernprune.kernels.masks import DrawnMasks, PackedMasks
from bernprune.kernels.reference import SumKernels
from bernprune.names import BackendName, check_name

CAPABILITY = 8, 0  # the least of a GPU with the matrix units that the kernels are written for
# Parameters of glibc's mallopt: from which size on a tensor has pages of its own, and how much free memory is kept.
_GLIBC = {-3: 2**25, -1: 2**30}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


@dataclass(frozen=True)
class MaskedOps:
    """The operations that masking needs; signatures as in ``kernels/reference.py``.

    Attributes:
        packs: whether masks that only keep or cut are given as bits, each for equally many rows in turn; otherwise they
            are given as numbers, one for each row.
        masked_units: masks the inputs of modules that multiply by themselves.
        activation: what ``masked_mlp`` takes for the module that a model has. Raises ``ValueError`` if there is none.
        attention_of_kept: None leaves attention to the model.
        draw: makes the bits of masks that are not stored; None makes them in plain torch.
        rotary: embedding of queries or keys; None leaves that, and norms, to the model.
        sums: None sums over masks in plain torch.
    """

    name: str
    masked_linear: Callable[..., torch.Tensor]
    masked_mlp: Callable[..., torch.Tensor]
    linear_to_kept: Callable[..., torch.Tensor]
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    masked_units: Callable[..., torch.Tensor]
    packs: bool = False
    dtypes: tuple[torch.dtype, ...] = ()  # of models; empty: any
    activation: Callable[[Any], Any] = lambda module: module
    attention_of_kept: Callable[..., torch.Tensor] | None = None
    draw: Callable[[DrawnMasks], PackedMasks] | None = None
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    sums: SumKernels | None = None


TORCH = MaskedOps(
    "torch",
    reference.masked_linear,
    reference.masked_mlp,
    reference.linear_to_kept,
    reference.cross_entropy,
    reference.divergence,
    reference.masked_units,
)


def load_backend(name: BackendName, device: torch.device) -> MaskedOps:
    """``auto`` takes plain torch, which runs everywhere; a name takes that one or fails.

    Raises:
        ConfigError: an unknown name.
        BackendError: it cannot run here.
    """
    check_name("backend", name, BackendName)
    if name != "triton":
        return TORCH
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            f"backend 'triton' cannot run on {device}: it needs a GPU, or TRITON_INTERPRET=1 in the environment to be "
            "tried slowly without one; use 'torch' or 'auto'"
        )
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        needed, given = (".".join(map(str, version)) for version in (CAPABILITY, found))
        raise BackendError(
            f"backend 'triton' cannot run on {device}: it needs a GPU of compute capability {needed} or more, but got "
            f"{given}; use 'torch' or 'auto'"
        )
    try:
        import bernprune.kernels.fused as fused
        import bernprune.kernels.sums as sums
    except ImportError as error:
        raise BackendError(
            f"backend 'triton' cannot run here, as Triton cannot be imported ({error}); use 'torch' or 'auto'"
        ) from None
    return MaskedOps(
        "triton",
        fused.masked_linear,
        fused.masked_mlp,
        fused.linear_to_kept,
        fused.cross_entropy,
        fused.divergence,
        fused.masked_units,
        packs=True,
        dtypes=fused.DTYPES,
        activation=fused.activation_of,
        attention_of_kept=fused.attention_of_kept,
        draw=fused.draw,
        rotary=fused.rotary,
        sums=SumKernels(sums.kept_sums, sums.score_sums, sums.activity_sums),
    )


def keep_freed_memory() -> None:
    """Let this process keep up to 1 GiB of memory that it frees, instead of giving it back and asking for it again.

    Every operation on a processor makes a tensor of megabytes, and fresh pages for each cost about as much as the
    operation. Tensors of 32 MiB and more, such as weights, are given back as ever. For whoever owns the process; where
    the C library is not glibc, nothing happens.
    """
    allocator = getattr(ctypes.CDLL(None), "mallopt", None)
    if allocator is not None:
        for parameter, value in _GLIBC.items():
            allocator(parameter, value)


def has_bfloat16_units() -> bool:
    """Whether this processor has units for products of bfloat16 matrices (AMX), as far as torch tells."""
    told = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return told is not None and bool(told())


def find_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one.

    Raises:
        BackendError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device {name!r} was asked for, but this machine has {torch.cuda.device_count()} GPUs")
    return device
