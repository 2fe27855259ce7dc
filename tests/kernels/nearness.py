"""How near to float64 a kernel has to come."""

import torch

FP32 = 1e-5
BF16 = 2e-3
"""What one rounding may cost: storing a normal draw moves it by 1.66e-3 of its norm."""


def assert_near(out: torch.Tensor, reference: torch.Tensor, roundings: int = 2) -> None:
    """Compare in the Frobenius norm, by the type of `out`.

    Args:
        out: What the kernel made; no NaN of its scratch may be in it.
        reference: The same of float64 inputs.
        roundings: How often a value becomes bf16 on its way: where it is stored, before that as a
            weight that the tensor cores take, and as the partial result of a split. They are
            independent, so errors add as squares.
    """
    assert not out.isnan().any()
    bar = BF16 * roundings**0.5 if out.dtype == torch.bfloat16 else FP32
    error = (out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
    assert error <= bar, f"{float(error):.3e} from float64, at most {bar:.3e}"
