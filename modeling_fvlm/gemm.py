"""Which library multiplies float32 matrices on the CPU: chosen by measuring, and only if it rounds as float32 must.

PyTorch hands linear layers to the BLAS it was built with, on x86 MKL, which does not use all of some processors (AMD's
with AVX-512); oneDNN, which PyTorch carries too, may be twice as fast there, or slower elsewhere. `choose_gemm_backend`
times a linear layer forward and backward by both and compares every product with float64. A backend qualifies whose
largest error, over the product of the absolute values, is below sqrt(K) * 2**-24 for inner dimension K: the size that
rounding errors of float32 have with high probability (Higham and Mary, SIAM J. Sci. Comput. 2019, doi
10.1137/18M1226312). Products of rounded inputs (TF32, bfloat16) miss it by a factor of five and more.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.nn import functional as F

BLAS, ONEDNN = "blas", "onednn"
BACKENDS = (BLAS, ONEDNN)
# A gain below this is noise of the measurement, and PyTorch's own way needs no reason.
MIN_GAIN = 1.1
# A smaller model spends its time elsewhere than in large matrix products: nothing is measured for it.
MIN_PARAMETERS_TO_MEASURE = 20_000_000
# Products of this size are checked in milliseconds, where a backend is named and its speed does not matter.
QUICK_CHECK = {"rows": 128, "inner": 768, "columns": 256, "repeats": 1}


class LowPrecisionError(RuntimeError):
    """Not even PyTorch's own way computes in float32."""


@dataclass(frozen=True)
class GemmCheck:
    """What one backend did.

    Attributes:
        gflops: 10^9 operations a second of wall time.
        error: Largest error of forward, input and weight gradients, over its bound; float32 is at most 1.
    """

    gflops: float
    error: float


@dataclass(frozen=True)
class GemmChoice:
    """The chosen backend and the checks of all that are available."""

    name: str
    checks: dict[str, GemmCheck]

    def describe(self) -> str:
        """One line for the log."""
        parts = [
            f"{name} {check.gflops:.0f} GFLOP/s, largest error {check.error:.2f} of float32's bound"
            for name, check in self.checks.items()
        ]
        return f"float32 matrix products on the CPU by {self.name} ({'; '.join(parts)})"


def onednn_is_available() -> bool:
    """Whether this PyTorch carries oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_matmul(one: Tensor, other: Tensor) -> Tensor:
    """`one @ other.T` of float32 matrices by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(one.contiguous(), other.contiguous(), None, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # What no gradient needs is not kept: the inputs of frozen layers are most of an adapted model's activations.
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.inputs_shape = inputs.shape
        return torch.ops.mkldnn._linear_pointwise(inputs.contiguous(), weight.contiguous(), bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        inputs, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        inputs_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            inputs_grad = onednn_matmul(rows, weight.T).view(ctx.inputs_shape)
        if ctx.needs_input_grad[1]:
            weight_grad = onednn_matmul(rows.T, inputs.flatten(0, -2).T)
        if ctx.needs_input_grad[2]:
            bias_grad = rows.sum(0)
        return inputs_grad, weight_grad, bias_grad


def _is_plain_float32(tensors: tuple) -> bool:
    given = [tensor for tensor in tensors if tensor is not None]
    is_plain = all(
        type(tensor) in (Tensor, Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        for tensor in given
    )
    has_rows = given[0].ndim > 1 and given[1].ndim == 2 and given[0].numel() > 0
    return is_plain and has_rows and not torch.is_autocast_enabled("cpu")


_blas_linear = F.linear


def _onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _is_plain_float32((inputs, weight, bias)):
        return _OneDNNLinear.apply(inputs, weight, bias)
    return _blas_linear(inputs, weight, bias)


@contextmanager
def gemm_backend(name: str) -> Iterator[None]:
    """Within, linear layers in float32 on the CPU run by this backend, on all threads of the process.

    Not by a `TorchFunctionMode`: Python takes that off for the time of `backward()`, and what checkpoints compute again
    there would run by another backend than in the forward pass.

    Raises:
        ValueError: If there is no such backend here.
    """
    if name not in BACKENDS or (name == ONEDNN and not onednn_is_available()):
        available = [BLAS, *([ONEDNN] if onednn_is_available() else [])]
        raise ValueError(f"GEMM backend {name!r} is not among those of this PyTorch: {available}.")
    before = F.linear
    if name == ONEDNN:
        F.linear = _onednn_linear
    elif before is _onednn_linear:
        F.linear = _blas_linear
    try:
        yield
    finally:
        F.linear = before


def active_gemm_backend() -> str:
    """The backend of the innermost `gemm_backend` in force."""
    return ONEDNN if F.linear is _onednn_linear else BLAS


def pick_gemm_backend(name: str | None, num_parameters: int) -> tuple[str, str | None]:
    """What a command runs its model by: the named backend, checked, or for a large model the one that measures best.

    Args:
        name: "blas" or "onednn"; None to choose.
        num_parameters: Of the model.

    Returns:
        The backend, and a line for the log: what was measured, or a warning of lowered precision; None for neither.

    Raises:
        ValueError: If the named backend is not there.
    """
    if name is None and num_parameters < MIN_PARAMETERS_TO_MEASURE:
        return BLAS, None
    with gemm_backend(name or BLAS):
        pass
    try:
        choice = choose_gemm_backend(**({} if name is None else QUICK_CHECK))
    except LowPrecisionError as error:
        return name or BLAS, f"WARNING: {error}"
    if name is None:
        return choice.name, choice.describe()
    if (error := choice.checks[name].error) > 1:
        return name, (
            f"WARNING: GEMM backend {name} rounds {error:.0f} times more than float32 may: some setting lowers its "
            f"precision, for instance the variable ONEDNN_DEFAULT_FPMATH_MODE. Undo it, or take {BLAS}."
        )
    return name, None


def choose_gemm_backend(rows: int = 1024, inner: int = 768, columns: int = 3072, repeats: int = 5) -> GemmChoice:
    """Time and check a linear layer `(rows, inner) -> (rows, columns)` by every backend; takes a second or two.

    Raises:
        LowPrecisionError: If not even PyTorch's own way computes in float32: some setting allows less.
    """
    # Whatever mode the caller is in: gradients are part of the check, and float32 is what is checked.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        return _choose(rows, inner, columns, repeats)


def _choose(rows: int, inner: int, columns: int, repeats: int) -> GemmChoice:
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    inputs = torch.randn(rows, inner, **draw).requires_grad_()
    weight = torch.randn(columns, inner, **draw).requires_grad_()
    gradient = torch.randn(rows, columns, **draw)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        product = F.linear(inputs, weight)
        return product.detach(), *torch.autograd.grad(product, (inputs, weight), gradient)

    names = [BLAS, *([ONEDNN] if onednn_is_available() else [])]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    errors: dict[str, float] = {}
    for _ in range(repeats):
        for name in names:
            with gemm_backend(name):
                start = time.perf_counter()
                results = run()
                seconds[name].append(time.perf_counter() - start)
            if name not in errors:
                errors[name] = _largest_error(results, inputs.detach(), weight.detach(), gradient)
    operations = 3 * 2 * rows * inner * columns / 1e9
    checks = {name: GemmCheck(operations / statistics.median(seconds[name]), errors[name]) for name in names}
    if checks[BLAS].error > 1:
        raise LowPrecisionError(
            f"float32 matrix products on this CPU have errors {checks[BLAS].error:.0f} times what float32 gives: some "
            "setting lowers the precision. Undo torch.set_float32_matmul_precision or torch.backends.mkldnn."
        )
    fast_enough = ONEDNN in checks and checks[ONEDNN].gflops > MIN_GAIN * checks[BLAS].gflops
    return GemmChoice(ONEDNN if fast_enough and checks[ONEDNN].error <= 1 else BLAS, checks)


def _largest_error(results: tuple[Tensor, ...], inputs: Tensor, weight: Tensor, gradient: Tensor) -> float:
    """Largest error of the three products over its bound."""
    pairs: list[tuple[Tensor, Tensor]] = [(inputs, weight.T), (gradient, weight), (gradient.T, inputs)]
    return max(_error(result, *pair) for result, pair in zip(results, pairs))


def _error(result: Tensor, one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    bound = one.shape[1] ** 0.5 * 2.0**-24 * (one.abs() @ other.abs())
    return float(((result.double() - one @ other).abs() / bound).max())
