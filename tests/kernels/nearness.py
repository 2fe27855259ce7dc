"""How near to float64 a kernel has to come."""

import torch

FP32 = 1e-5
A_ROUNDING = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
"""What one may cost: storing a normal draw in bfloat16 moves it by 1.66e-3 of its norm."""


def assert_near(out: torch.Tensor, reference: torch.Tensor, roundings: int = 2) -> None:
    """Compare in the Frobenius norm, by the type of `out`.

    Args:
        out: What the kernel made; no NaN of its scratch may be in it.
        reference: The same of float64 inputs.
        roundings: How often a value becomes 16 bits wide on its way: where it is stored, before
            that as a weight that the tensor cores take, and as the partial result of a split. They
            are independent, so errors add as squares.
    """
    assert not out.isnan().any()
    bar = A_ROUNDING[out.dtype] * roundings**0.5 if out.dtype in A_ROUNDING else FP32
    error = (out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
    assert error <= bar, f"{float(error):.3e} from float64, at most {bar:.3e}"
