"""Run Triton kernels on the CPU: interpreter on, its bf16 repaired, scratch poisoned."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def widen(x: Any) -> Any:
    """Turn bf16 bit patterns, which numpy cannot multiply, into float32."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    bits = x.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


@pytest.fixture(autouse=True, scope="session")
def interpreter_knows_bf16() -> Iterator[None]:
    """The stock interpreter multiplies the raw bits (triton-lang/triton issue 11584).

    It also truncates where a GPU rounds to nearest, so its errors would be twice the real ones.
    """
    builder = interpreter.InterpreterBuilder
    stock_dot, stock_cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, accumulate: Any) -> Any:
        return stock_dot(self, widen(a), widen(b), d, precision, accumulate)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return stock_cast(self, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast
    yield
    builder.create_dot, builder.cast_impl = stock_dot, stock_cast


@pytest.fixture(autouse=True)
def scratch_holds_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads what nobody wrote gives NaN."""
    stock = torch.empty

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        out = stock(*size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", empty)
