"""Tensors on the wire: declared, bounded and checked before anybody makes an array of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, FrameTooLarge, RemoteProtocolError
from swarmpy.proto.tensor import (
    ITEM_BYTES,
    TENSOR_BYTES_MAX,
    Tensor,
    TensorSpec,
    bytes_of,
    check_hidden,
    split,
)

SPEC = (TensorSpec("float32", (-1, 8)),)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_the_size_of_a_tensor_is_its_items_times_their_bytes(dtype: str) -> None:
    assert bytes_of(dtype, (2, 3)) == 6 * ITEM_BYTES[dtype]  # type: ignore[arg-type]
    assert bytes_of(dtype, ()) == ITEM_BYTES[dtype]  # type: ignore[arg-type]


@pytest.mark.parametrize(("extra", "is_allowed"), [(-1, True), (0, True), (1, False)])
def test_a_tensor_has_32_mebibytes_at_most(extra: int, is_allowed: bool) -> None:
    if is_allowed:
        assert bytes_of("uint8", (TENSOR_BYTES_MAX + extra,)) == TENSOR_BYTES_MAX + extra
    else:
        with pytest.raises(FrameTooLarge):
            bytes_of("uint8", (TENSOR_BYTES_MAX + extra,))


def test_a_negative_dimension_is_refused() -> None:
    with pytest.raises(BadMessage, match="negative"):
        bytes_of("uint8", (3, -1))


def test_a_hidden_state_that_fits_its_spec_passes() -> None:
    check_hidden((Tensor("float32", (3, 8), bytes(96)),), SPEC, count=3)


@pytest.mark.parametrize(
    ("hidden", "match"),
    [
        ((), "0 tensors at a cut that carries 1"),
        ((Tensor("float32", (3, 8), bytes(96)),) * 2, "2 tensors"),
        ((Tensor("float16", (3, 8), bytes(48)),), "float16"),
        ((Tensor("float32", (2, 8), bytes(64)),), "expected float32"),
        ((Tensor("float32", (3, 8), bytes(95)),), "95 bytes"),
        ((Tensor("float32", (3, 8), bytes(97)),), "97 bytes"),
    ],
)
def test_a_hidden_state_of_another_kind_is_refused(hidden: tuple[Tensor, ...], match: str) -> None:
    with pytest.raises(BadMessage, match=match):
        check_hidden(hidden, SPEC, count=3)


def test_splitting_copies_nothing() -> None:
    payload = bytes(range(24))
    specs = (TensorSpec("float32", (2, 2)), TensorSpec("uint8", (8,)))

    first, second = split(specs, memoryview(payload))

    assert bytes(first.data) == payload[:16]
    assert bytes(second.data) == payload[16:]
    assert isinstance(second.data, memoryview)
    assert second.data.obj is payload
    assert first.spec == specs[0]


@pytest.mark.parametrize("size", [0, 15, 17])
def test_declared_sizes_must_add_up(size: int) -> None:
    with pytest.raises(BadMessage, match="16 bytes declared"):
        split((TensorSpec("float32", (2, 2)),), memoryview(bytes(size)))


@given(
    st.lists(
        st.builds(
            TensorSpec,
            st.sampled_from(sorted(ITEM_BYTES)),
            st.lists(st.integers(-1, 1 << 30), max_size=6).map(tuple),
        ),
        max_size=4,
    ),
    st.binary(max_size=64),
)
def test_any_declaration_is_kept_or_refused(specs: list[TensorSpec], payload: bytes) -> None:
    try:
        tensors = split(specs, memoryview(payload))
    except RemoteProtocolError:
        return
    assert b"".join(bytes(tensor.data) for tensor in tensors) == payload
