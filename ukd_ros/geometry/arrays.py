# SPDX-License-Identifier: Apache-2.0
"""How the value types keep their arrays: one contiguous, read-only, shape-checked copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def frozen_array(
    value: npt.ArrayLike,
    shape: tuple[int | None, ...],
    name: str,
    dtype: npt.DTypeLike = np.float64,
    *,
    finite: bool = True,
) -> npt.NDArray[Any]:
    """Return a contiguous read-only copy of ``value`` with the given shape and dtype.

    ``None`` in ``shape`` accepts any length on that axis. Integer and boolean targets accept only values that
    survive the conversion unchanged. ValueError names the field when the shape is wrong, when a value is not a
    number, or (unless ``finite`` is False) when one is NaN or infinite.
    """
    try:
        array = np.array(value, dtype=dtype, order="C", copy=True)
        exact = array.dtype.kind == "f" or bool(np.array_equal(array, np.asarray(value)))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: cannot be read as an array of {np.dtype(dtype).name} ({error}).") from error
    if array.ndim != len(shape) or any(
        want is not None and want != have for want, have in zip(shape, array.shape, strict=True)
    ):
        wanted = "[" + ", ".join("any" if length is None else str(length) for length in shape) + "]"
        raise ValueError(f"{name}: has shape {list(array.shape)}, but {wanted} is needed.")
    if not exact:
        raise ValueError(f"{name}: holds values that {np.dtype(dtype).name} cannot represent.")
    if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name}: holds NaN or infinite values.")
    array.setflags(write=False)
    return array
