"""Which implementation of the masked operations runs, and on which device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bernprune.errors import BackendError
from bernprune.kernels import reference  # type: ignore[attr-defined]
from bernprune.names import BackendName, check_name


@dataclass(frozen=True)
class MaskedOps:
    """The operations that masking needs; signatures as in ``kernels/reference.py``."""

    name: str
    masked_linear: Callable[..., torch.Tensor]
    masked_mlp: Callable[..., torch.Tensor]


def load_backend(name: BackendName, device: torch.device) -> MaskedOps:
    """``auto`` takes plain torch, which runs everywhere; a name takes that one or fails.

    Raises:
        ConfigError: an unknown name.
        BackendError: it cannot run here.
    """
    check_name("backend", name, BackendName)
    if name == "triton":
        raise BackendError(
            f"backend 'triton' cannot run on {device}: this version has no Triton kernels yet; use 'torch' or 'auto'"
        )
    return MaskedOps("torch", reference.masked_linear, reference.masked_mlp)


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
