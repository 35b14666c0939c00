"""Whether a tensor that came over a link holds only finite numbers.

Checked where it is received, so that no engine ever sees a NaN or an infinity: one would poison a
slot's state for good. Spec: protocols/tensor.md.
"""

from __future__ import annotations

import math

from swarmpy.proto.tensor import Tensor

SUMMED_BYTES_MAX = 16 * 1024
"""Up to here Python's own sum is as fast as numpy and touches far less cold memory: a decode row is
checked three times a hop, each time just after an engine has swept every cache."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; whole numbers always are finite."""
    if tensor.dtype == "float32" and len(tensor.data) <= SUMMED_BYTES_MAX:
        # Added up as doubles, finite floats cannot overflow, and a NaN or infinity stays.
        return math.isfinite(sum(memoryview(tensor.data).cast("B").cast("f")))
    import numpy as np

    match tensor.dtype:
        case "float32":
            return bool(np.isfinite(np.frombuffer(tensor.data, np.float32)).all())
        case "float16":
            return bool(np.isfinite(np.frombuffer(tensor.data, np.float16)).all())
        case "bfloat16":
            # numpy has no bfloat16: all exponent bits set is NaN or infinity.
            exponents = np.frombuffer(tensor.data, np.uint16) & 0x7F80
            return not bool((exponents == 0x7F80).any())
        case _:
            return True
