"""Names of torch devices."""

from __future__ import annotations

from suffice.arguments import did_you_mean

_KINDS = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "mtia", "xla", "meta", "privateuseone")


def check_device(argument: str, device: str) -> str:
    """Return the name of a device if torch can use it here. `cpu` and misspelt names need no import of torch.

    Args:
        argument: argument or option that gave it, for the error.
        device: name of a device, such as `cpu` or `cuda:0`.

    Raises:
        ValueError: there is no such device here.

    """
    if device == "cpu":
        return device
    kind = device.partition(":")[0]
    refusal = f"{argument} must be one that torch can use here, got {device!r}"
    if kind not in _KINDS:
        hint = ". Did you mean 'cuda'?" if kind.lower() == "gpu" else did_you_mean(kind, _KINDS)
        raise ValueError(f"{refusal}{hint or '. Examples: cpu, cuda:0'}")

    import torch  # takes seconds

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        count = torch.cuda.device_count() if kind == "cuda" else 0
        found = f". Torch finds {count} CUDA device{'s' * (count != 1)} here" if kind == "cuda" else ""
        raise ValueError(refusal + found) from error
    return device
