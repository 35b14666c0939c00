"""MLX arrays from and to tensors of the wire, exact to the bit.

bfloat16 travels as its raw 16 bits: numpy has no such type.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from swarmpy.proto.tensor import DType, Tensor

_MLX_TYPES: dict[str, mx.Dtype] = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "int32": mx.int32,
    "uint32": mx.uint32,
    "int8": mx.int8,
    "uint8": mx.uint8,
    "bool": mx.bool_,
}
_WIRE_TYPES = {dtype: name for name, dtype in _MLX_TYPES.items()}
_NUMPY_TYPES = {name: np.dtype(name) for name in _MLX_TYPES if name != "bfloat16"}


def wire_type(dtype: mx.Dtype) -> DType | None:
    """Return the wire's name of an MLX type, None where the wire has none."""
    return _WIRE_TYPES.get(dtype)  # type: ignore[return-value]


def mlx_type(name: DType) -> mx.Dtype:
    """Return the MLX type of the wire's name."""
    return _MLX_TYPES[name]


def to_mlx(tensor: Tensor, shape: tuple[int, ...]) -> mx.array:
    """Return a tensor's numbers as an array of `shape`, which has the same size."""
    if tensor.dtype == "bfloat16":
        raw = np.frombuffer(tensor.data, np.uint16).reshape(shape)
        return mx.array(raw).view(mx.bfloat16)
    return mx.array(np.frombuffer(tensor.data, _NUMPY_TYPES[tensor.dtype]).reshape(shape))


def to_tensor(array: mx.array, shape: tuple[int, ...]) -> Tensor:
    """Return an evaluated array as a tensor of `shape`, which has the same size.

    The bytes are the array's own memory where that is contiguous.
    """
    name = wire_type(array.dtype)
    assert name is not None
    raw = array.view(mx.uint16) if name == "bfloat16" else array
    data = np.ascontiguousarray(np.array(raw, copy=False))
    return Tensor(name, shape, data.reshape(-1).view(np.uint8).data)
