"""What a runtime says when a row of logits cannot be sampled: the same words on every device."""

from __future__ import annotations

from ..errors import DeviceError, RequestError
from .contract import SamplingRow


def bad_logits(what: str, index: int, row: SamplingRow) -> DeviceError:
    """Row ``index`` has ``what`` ("NaN", "+inf", "only -inf") logits."""
    error = DeviceError(
        f"the model produced {what} logits in row {index}, for the token at position {row.position}; its weights are "
        "damaged or overflow the compute type: check the file's checksum, and compare with device: cpu"
    )
    error.row = index
    return error


def nothing_left(index: int, row: SamplingRow) -> RequestError:
    """Row ``index`` may choose no token."""
    what = "logit_bias, or min_tokens with its stop tokens,"
    if row.allowed is not None:
        what = "structured_outputs, with logit_bias where there is one,"
    error = RequestError(
        f"no token is left to choose at position {row.position}: {what} bans every one that the model allows"
    )
    error.row = index
    return error
