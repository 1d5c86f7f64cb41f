"""Where a model runs and in which dtype, from the words of the command line. Heavy libraries are imported inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from unmemorize.errors import ConfigError
from unmemorize.verbs.answers import Precision

if TYPE_CHECKING:
    import torch

Moved = TypeVar("Moved")


def dtype_of(precision: Precision | None) -> torch.dtype | None:
    """Return a dtype by its name; None keeps the checkpoint's."""
    import torch

    return None if precision is None else getattr(torch, precision)


def on_device(model: Moved, device: str) -> Moved:
    """Move a model or pipeline to a device, "auto" being the first accelerator, else the CPU.

    Raises:
        ConfigError: if the device is not there.
    """
    import torch

    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found.type if found is not None else "cpu"
    if device == "meta":
        raise ConfigError(
            "device 'meta' holds no numbers, so nothing can be measured; choose another --device"
        )
    try:
        return model.to(device)  # type: ignore[attr-defined, no-any-return]
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot use device {device!r}: {reason}; choose another --device") from error
