"""The GEMM backend of the CPU: equal products and gradients, a self-check that sees lower precision, an honest log."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from modeling_fvlm import gemm
from modeling_fvlm.gemm import BLAS, ONEDNN, GemmCheck, GemmChoice, choose_gemm_backend, gemm_backend

needs_onednn = pytest.mark.skipif(not gemm.onednn_is_available(), reason="this PyTorch carries no oneDNN")
SMALL = {"rows": 64, "inner": 96, "columns": 80, "repeats": 2}


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_both_backends_give_the_same_layer(bias, monkeypatch):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(12, 20, bias=bias), torch.randn(2, 5, 12).requires_grad_()
    used = []
    apply = gemm._OneDNNLinear.apply
    monkeypatch.setattr(gemm._OneDNNLinear, "apply", lambda *tensors: used.append(1) or apply(*tensors))
    results = []
    for name in (BLAS, ONEDNN):
        with gemm_backend(name):
            output = layer(inputs)
            # every other row of a wider tensor: a gradient that is not contiguous
            results.append(
                [output, *torch.autograd.grad((output * output[..., :1]).sum(), [inputs, *layer.parameters()])]
            )
    assert len(used) == 1
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@needs_onednn
@pytest.mark.parametrize("gradient_of", [lambda y: y.backward(), lambda y: torch.autograd.backward(y)])
def test_checkpoints_recompute_by_the_same_backend(monkeypatch, gradient_of):
    layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    used = []
    apply = gemm._OneDNNLinear.apply
    monkeypatch.setattr(gemm._OneDNNLinear, "apply", lambda *tensors: used.append(1) or apply(*tensors))
    plain = F.linear
    with gemm_backend(ONEDNN):
        output = checkpoint(layers, torch.ones(4, 8, requires_grad=True), use_reentrant=False)
        assert len(used) == 2
        gradient_of(output.sum())
    # The recomputation stops once it has every saved tensor, here at the last layer.
    assert len(used) == 4 and F.linear is plain


@needs_onednn
def test_what_is_not_plain_float32_passes_by(monkeypatch):
    monkeypatch.setattr(gemm._OneDNNLinear, "apply", lambda *tensors: pytest.fail("sent to oneDNN"))
    with gemm_backend(ONEDNN):
        F.linear(torch.ones(2, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64))
        F.linear(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16))
        F.linear(torch.ones(0, 3), torch.ones(4, 3))
        with torch.autocast("cpu", torch.bfloat16):
            F.linear(torch.ones(2, 3), torch.ones(4, 3))


def test_the_choice_is_measured_and_said():
    choice = choose_gemm_backend(**SMALL)
    assert choice.name in choice.checks and BLAS in choice.checks
    assert all(check.gflops > 0 and 0 < check.error <= 1 for check in choice.checks.values())
    line = choice.describe()
    assert choice.name in line and "GFLOP/s" in line and "error" in line


@needs_onednn
@pytest.mark.parametrize(
    "gflops,error,chosen", [(250, 0.5, ONEDNN), (250, 30.0, BLAS), (105, 0.1, BLAS)], ids=["faster", "rounds", "equal"]
)
def test_only_a_faster_backend_that_is_exact_is_taken(monkeypatch, gflops, error, chosen):
    """Times and errors are put in: what this machine measures is not the test's to know."""
    clock = iter(range(10_000))
    rate = {BLAS: 100, ONEDNN: gflops}
    now = [0.0]
    current = []

    def perf_counter():
        # every second call ends a measurement: it took as long as the backend's rate says
        if next(clock) % 2:
            operations = 3 * 2 * SMALL["rows"] * SMALL["inner"] * SMALL["columns"] / 1e9
            now[0] += operations / rate[current[-1]]
        return now[0]

    real_backend = gemm.gemm_backend
    monkeypatch.setattr(gemm, "gemm_backend", lambda name: current.append(name) or real_backend(name))
    monkeypatch.setattr(gemm.time, "perf_counter", perf_counter)
    monkeypatch.setattr(gemm, "_largest_error", lambda *results: error if current[-1] == ONEDNN else 0.1)
    assert choose_gemm_backend(**SMALL).name == chosen


@pytest.mark.parametrize("kept_bits", [10, 7], ids=["tf32", "bfloat16"])
def test_products_of_rounded_inputs_are_found_out(monkeypatch, kept_bits):
    """Inputs rounded as TF32 and bfloat16 hardware rounds them, products summed in full float32."""

    def rounded(tensor):
        scale = 2.0 ** (kept_bits + 1 - torch.frexp(tensor).exponent)
        return (tensor * scale).round() / scale

    linear = F.linear
    monkeypatch.setattr(gemm.F, "linear", lambda x, weight: linear(rounded(x), rounded(weight)))
    with pytest.raises(gemm.LowPrecisionError, match="lowers the precision"):
        choose_gemm_backend()


@needs_onednn
@pytest.mark.parametrize("name", [BLAS, ONEDNN])
def test_a_frozen_layer_keeps_no_activations(name):
    layer, kept = nn.Linear(6, 5).requires_grad_(False), []
    inputs = torch.randn(7, 6, requires_grad=True)
    with gemm_backend(name), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        output = layer(inputs)
    assert inputs.shape not in kept
    torch.testing.assert_close(torch.autograd.grad(output.sum(), inputs)[0], layer.weight.sum(0).expand(7, 6))


def test_the_check_minds_no_mode_of_its_caller():
    with torch.no_grad():
        assert gemm.pick_gemm_backend(BLAS, 1) == (BLAS, None)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert gemm.pick_gemm_backend(BLAS, 1) == (BLAS, None)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_onednn
def test_backends_nest():
    plain = F.linear
    with gemm_backend(ONEDNN):
        assert gemm.active_gemm_backend() == ONEDNN
        with gemm_backend(BLAS):
            assert F.linear is plain and gemm.active_gemm_backend() == BLAS
        assert gemm.active_gemm_backend() == ONEDNN
    assert F.linear is plain


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'magma' is not among .*blas"), gemm_backend("magma"):
        pass
    assert "blas 5 GFLOP/s" in GemmChoice(BLAS, {BLAS: GemmCheck(5.0, 0.1)}).describe()
