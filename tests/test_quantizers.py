"""Forward values and gradients against the closed forms of the papers, written out here a second time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qreg_utils.quantizers import (
    QUANTIZERS,
    DoReFaActivation,
    DoReFaWeight,
    LSQActivation,
    LSQWeight,
    PACTActivation,
    clipped_uniform,
    dorefa_unrounded,
    dorefa_weight,
    lsq,
    lsq_offset,
    round_ste,
)
from qreg_utils.quantizers.lsq import lsq_formula, lsq_offset_formula
from qreg_utils.quantizers.pact import clipped_uniform_formula
from qreg_utils.quantizers.parts import PARTS

ALL_BITS = range(2, 9)
WHOLE = sorted(QUANTIZERS.keys() - PARTS.keys())  # parts round to other numbers of levels, or not at all


def gradients(function, *inputs):
    """Output and gradients of sum(output * weights) with fixed random weights, in float64."""
    inputs = [x.double().clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    upstream = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(7))
    return output.detach(), upstream, torch.autograd.grad((output * upstream).sum(), inputs)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_lsq_forward_and_gradients_are_the_papers(bits, signed):
    q_min, q_max = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    x, step = 3 * torch.randn(1000, dtype=torch.float64), torch.tensor(3.0 / q_max, dtype=torch.float64)
    scale = 0.37
    output, upstream, (grad_x, grad_step) = gradients(lambda x, s: lsq(x, s, q_min, q_max, scale), x, step)

    expected_output, expected_x, expected_step = [], [], 0.0
    for value, weight in zip(x.tolist(), upstream.tolist(), strict=True):
        ratio = value / step.item()
        expected_output.append(round(min(max(ratio, q_min), q_max)) * step.item())  # Eqs. 1 and 2
        inside = q_min < ratio < q_max
        expected_x.append(weight if inside else 0.0)  # Eq. 5
        slope = round(ratio) - ratio if inside else (q_min if ratio <= q_min else q_max)  # Eq. 3
        expected_step += weight * slope * scale
    torch.testing.assert_close(output, torch.tensor(expected_output, dtype=torch.float64))
    torch.testing.assert_close(grad_x, torch.tensor(expected_x, dtype=torch.float64))
    assert grad_step.item() == pytest.approx(expected_step, rel=1e-9)
    assert len(output.unique()) <= 2**bits


@pytest.mark.parametrize("signed", [True, False])
def test_lsq_step_gradient_is_the_derivative_away_from_the_roundings(signed):
    """Outside the range the output really is linear in the step, so finite differences must agree."""
    q_min, q_max = (-2, 1) if signed else (0, 3)
    x = torch.tensor([-50.0, -9.0, 9.0, 50.0], dtype=torch.float64)
    _, upstream, (_, grad_step) = gradients(lambda x, s: lsq(x, s, q_min, q_max), x, torch.tensor(0.5))
    eps = 1e-6
    high, low = (lsq(x, torch.tensor(0.5 + d, dtype=torch.float64), q_min, q_max) for d in (eps, -eps))
    assert grad_step.item() == pytest.approx((((high - low) / (2 * eps)) * upstream).sum().item(), rel=1e-6)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_pact_forward_and_gradients_are_the_papers(bits, signed):
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    x, alpha = 3 * torch.randn(1000, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    output, upstream, (grad_x, grad_alpha) = gradients(lambda x, a: clipped_uniform(x, a, levels, signed), x, alpha)

    expected_output, expected_x, expected_alpha = [], [], 0.0
    low = -1.7 if signed else 0.0
    for value, weight in zip(x.tolist(), upstream.tolist(), strict=True):
        clipped = min(max(value, low), 1.7)  # Eq. 1: 0.5 (|x| - |x - alpha| + alpha)
        expected_output.append(round(clipped * levels / 1.7) * 1.7 / levels)  # Eq. 2
        expected_x.append(weight if low < value < 1.7 else 0.0)
        expected_alpha += weight * (1 if value >= 1.7 else -1 if signed and value <= low else 0)  # Eq. 3
    torch.testing.assert_close(output, torch.tensor(expected_output, dtype=torch.float64))
    torch.testing.assert_close(grad_x, torch.tensor(expected_x, dtype=torch.float64))
    assert grad_alpha.item() == pytest.approx(expected_alpha, rel=1e-9)
    if not signed:
        formula = 0.5 * (x.abs() - (x - 1.7).abs() + 1.7)
        assert (output - formula).abs().max() <= 1.7 / levels / 2 + 1e-12


@pytest.mark.parametrize("bits", ALL_BITS)
def test_dorefa_weights_and_gradient_are_the_papers(bits):
    weight = torch.randn(500, dtype=torch.float64)
    output, upstream, (grad,) = gradients(lambda w: dorefa_weight(w, bits), weight)

    squashed = [math.tanh(w) for w in weight.tolist()]
    largest = max(range(len(squashed)), key=lambda i: abs(squashed[i]))
    top, levels = abs(squashed[largest]), 2**bits - 1
    expected = [2 * round((t / (2 * top) + 0.5) * levels) / levels - 1 for t in squashed]  # Eqs. 5 and 9
    torch.testing.assert_close(output, torch.tensor(expected, dtype=torch.float64))

    # straight through the rounding: d out / d w = d (tanh(w) / max|tanh|) / d w, the maximum included
    weights = upstream.tolist()
    slopes = [w * (1 - t * t) / top for w, t in zip(weights, squashed, strict=True)]
    through_maximum = sum(w * t / top for w, t in zip(weights, squashed, strict=True))
    sign = math.copysign(1, squashed[largest])
    slopes[largest] -= through_maximum * sign * (1 - squashed[largest] ** 2) / top
    torch.testing.assert_close(grad, torch.tensor(slopes, dtype=torch.float64))


def test_dorefa_target_has_the_gradient_that_finite_differences_give():
    weight = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dorefa_unrounded, (weight,))


def test_round_ste_is_exact_and_straight_through():
    x = torch.linspace(-20, 20, 4001, requires_grad=True)
    y = round_ste(x)
    assert torch.equal(y, x.round())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


@settings(max_examples=50, deadline=None)
@given(
    bits=st.integers(2, 8),
    method=st.sampled_from(WHOLE),
    scale=st.floats(1e-4, 1e4),
    shift=st.floats(-1, 1),
    seed=st.integers(0, 99),
)
def test_any_weight_has_at_most_2_to_the_bits_levels(bits, method, scale, shift, seed):
    weight = scale * (torch.randn(200, generator=torch.Generator().manual_seed(seed)) + shift)
    quantizer = QUANTIZERS[method][0](bits, weight)
    once = quantizer(weight)
    assert once.shape == weight.shape and once.isfinite().all()
    assert len(once.unique()) <= 2**bits


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(2, 8), method=st.sampled_from(WHOLE), scale=st.floats(1e-3, 1e3), signed=st.booleans())
def test_any_activation_has_at_most_2_to_the_bits_levels_and_keeps_its_sign(bits, method, scale, signed):
    x = scale * torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    x = x if signed else x.relu()
    quantizer = QUANTIZERS[method][1](bits)
    quantizer.calibrate(x)
    y = quantizer(x)
    assert quantizer.signed == signed
    assert len(y.unique()) <= 2**bits
    assert (y * x >= 0).all()  # never to the other side of zero
    if signed:
        assert (y < 0).any()  # negative inputs are not clipped away


def test_lsq_starts_from_the_papers_step():
    weight = torch.randn(64, 32)
    for bits in ALL_BITS:
        q_max = 2 ** (bits - 1) - 1
        expected = 2 * weight.abs().mean().item() / math.sqrt(q_max)
        assert LSQWeight(bits, weight).step.item() == pytest.approx(expected)
    x = torch.rand(8, 100)
    activation = LSQActivation(4)
    activation.calibrate(x)
    assert activation.step.item() == pytest.approx(2 * x.mean().item() / math.sqrt(15))


def test_lsq_gradient_scale_counts_weights_and_the_features_of_one_sample():
    weight = torch.randn(16, 3, 3, 3)
    assert LSQWeight(4, weight).gradient_scale == pytest.approx(1 / math.sqrt(16 * 27 * 7))

    def step_gradient(batch):
        quantizer = LSQActivation(4)
        quantizer.calibrate(torch.rand(2, 5, generator=torch.Generator().manual_seed(0)))
        x = torch.full((batch, 5), 100.0)  # far outside: every element contributes Q_P
        quantizer(x).sum().backward()
        return quantizer.step.grad.item()

    assert step_gradient(1) == pytest.approx(5 * 15 / math.sqrt(5 * 15))
    assert step_gradient(8) == pytest.approx(8 * 5 * 15 / math.sqrt(5 * 15))  # the scale does not know the batch


@pytest.mark.parametrize("value", [-0.3, 0.0, 1e-20])
def test_scales_stay_positive_whatever_the_optimizer_does(value):
    weight, x = torch.randn(50), torch.rand(4, 10)
    quantizers = [LSQWeight(4, weight), LSQActivation(4), PACTActivation(4)]
    for quantizer in quantizers:
        if isinstance(quantizer, LSQActivation | PACTActivation):
            quantizer.calibrate(x)
        with torch.no_grad():
            next(quantizer.parameters()).fill_(value)
        assert quantizer.step_size() > 0
        assert quantizer(weight if isinstance(quantizer, LSQWeight) else x).isfinite().all()


def test_eight_bits_are_close_to_full_precision():
    weight = 0.1 * torch.randn(64, 64)
    x = torch.randn(32, 64).relu()
    for make_weight, make_activation in QUANTIZERS.values():
        quantizer = make_weight(8, weight)
        assert (quantizer(weight) - quantizer.unrounded(weight)).std() < 0.05 * quantizer.unrounded(weight).std()
        activation = make_activation(8)
        inputs = x.clamp(max=1)  # DoReFa's range
        activation.calibrate(inputs)
        assert (activation(inputs) - inputs).abs().max() <= activation.step_size() / 2 + 1e-6


def test_noise_is_measured_on_the_scale_that_is_rounded():
    weight = torch.randn(300)
    assert torch.equal(LSQWeight(4, weight).unrounded(weight), weight)
    expected = DoReFaWeight(4, weight).unrounded(weight)
    assert expected.abs().max() == 1
    assert (dorefa_weight(weight, 4) - expected).abs().max() <= 1 / 15 + 1e-6


def test_an_activation_quantizer_must_be_calibrated():
    for _, make in QUANTIZERS.values():
        with pytest.raises(RuntimeError, match="calibrate"):
            make(4)(torch.rand(2, 3))


def test_dorefa_clips_relu_outputs_at_one_and_scales_signed_inputs():
    positive, signed = DoReFaActivation(2), DoReFaActivation(8)
    positive.calibrate(torch.tensor([[0.0, 5.0]]))
    assert positive(torch.tensor([[0.1, 0.4, 9.0]])).tolist() == [[0.0, pytest.approx(1 / 3), 1.0]]
    signed.calibrate(torch.tensor([[-4.0, 2.0]]))
    assert signed(torch.tensor([[-4.0, 2.0]]))[0, 0] == -4


# --- LSQ with an offset (LSQ+) ----------------------------------------------------------------------------------------


def lsq_offset_by_autograd(x, step, offset, levels):
    """LSQ+ as its Eqs. 1 and 2 read, clipped and then rounded; automatic differentiation does the rest."""
    return round_ste(((x - offset) / step).clamp(0, levels)) * step + offset


@pytest.mark.parametrize("bits", ALL_BITS)
def test_lsq_offset_forward_and_gradients_are_the_papers(bits):
    levels = 2**bits - 1
    x = 3 * torch.randn(1000, dtype=torch.float64)
    step, offset = torch.tensor(4.0 / levels, dtype=torch.float64), torch.tensor(-0.7, dtype=torch.float64)
    scale = 0.37
    output, upstream, (grad_x, grad_step, grad_offset) = gradients(
        lambda x, s, o: lsq_offset(x, s, o, levels, scale), x, step, offset
    )

    expected_output, expected_x, expected_step, expected_offset = [], [], 0.0, 0.0
    for value, weight in zip(x.tolist(), upstream.tolist(), strict=True):
        ratio = (value + 0.7) / step.item()
        expected_output.append(round(min(max(ratio, 0), levels)) * step.item() - 0.7)  # Eqs. 1 and 2
        inside = 0 < ratio < levels
        expected_x.append(weight if inside else 0.0)
        expected_step += weight * scale * (round(ratio) - ratio if inside else 0 if ratio <= 0 else levels)  # Eq. 4
        expected_offset += weight * scale * (0 if inside else 1)  # Eq. 5
    torch.testing.assert_close(output, torch.tensor(expected_output, dtype=torch.float64))
    torch.testing.assert_close(grad_x, torch.tensor(expected_x, dtype=torch.float64))
    assert grad_step.item() == pytest.approx(expected_step, rel=1e-9)
    assert grad_offset.item() == pytest.approx(expected_offset, rel=1e-9)
    assert (grad_x == 0).any() and (grad_x != 0).any()
    assert len(output.unique()) <= 2**bits


@settings(max_examples=100, deadline=None)
@given(
    bits=st.integers(2, 8),
    step=st.floats(1e-3, 1e3),
    offset=st.floats(-1e3, 1e3),
    scale=st.floats(1e-3, 10),
    seed=st.integers(0, 99),
)
def test_lsq_offset_is_what_automatic_differentiation_makes_of_its_formula(bits, step, offset, scale, seed):
    levels = 2**bits - 1
    generator = torch.Generator().manual_seed(seed)
    ratios = (levels + 6) * torch.rand(7, 30, generator=generator, dtype=torch.float64) - 3  # some outside
    step, offset = torch.tensor(step, dtype=torch.float64), torch.tensor(offset, dtype=torch.float64)
    x = ratios * step + offset
    ours, _, (grad_x, *grad_scales) = gradients(lambda *p: lsq_offset(*p, levels, scale), x, step, offset)
    theirs, _, (wanted_x, *wanted) = gradients(lambda *p: lsq_offset_by_autograd(*p, levels), x, step, offset)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grad_x, wanted_x)
    for actual, expected in zip(grad_scales, wanted, strict=True):
        assert actual.item() == pytest.approx(scale * expected.item(), rel=1e-7, abs=1e-7 * scale * levels)
    assert len(ours.unique()) <= 2**bits
    inside = (ratios > 0) & (ratios < levels)
    assert ((ours - x).abs() <= step * (0.5 + 1e-6) + 1e-9)[inside].all()


def test_lsq_offset_gradients_are_the_derivatives_away_from_the_roundings():
    """Outside the range the output really is linear in step and offset, so finite differences must agree."""
    x = torch.tensor([-50.0, -9.0, 9.0, 50.0], dtype=torch.float64)
    step, offset, eps = torch.tensor(0.5).double(), torch.tensor(-0.3).double(), 1e-6
    _, upstream, (grad_x, grad_step, grad_offset) = gradients(lambda x, s, o: lsq_offset(x, s, o, 3), x, step, offset)
    for actual, (d_step, d_offset) in {grad_step: (eps, 0), grad_offset: (0, eps)}.items():
        high, low = (lsq_offset(x, step + sign * d_step, offset + sign * d_offset, 3) for sign in (1, -1))
        assert actual.item() == pytest.approx((((high - low) / (2 * eps)) * upstream).sum().item(), rel=1e-6)
    assert (grad_x == 0).all()


def test_lsq_offset_zero_is_unsigned_lsq():
    x, step, zero = 3 * torch.randn(500, dtype=torch.float64), torch.tensor(0.3), torch.tensor(0.0)
    ours, _, (grad_x, grad_step, _) = gradients(lambda x, s, o: lsq_offset(x, s, o, 15, 0.1), x, step, zero)
    theirs, _, (wanted_x, wanted_step) = gradients(lambda x, s: lsq(x, s, 0, 15, 0.1), x, step)
    assert torch.equal(ours, theirs) and torch.equal(grad_x, wanted_x)
    assert grad_step.item() == pytest.approx(wanted_step.item(), rel=1e-12)


def test_lsq_offset_moves_with_its_input():
    x, step, offset = torch.randn(500, dtype=torch.float64), torch.tensor(0.25), torch.tensor(-0.5)
    here = gradients(lambda x, s, o: lsq_offset(x, s, o, 7), x, step, offset)
    there = gradients(lambda x, s, o: lsq_offset(x, s, o, 7), x + 8, step, offset + 8)
    torch.testing.assert_close(there[0], here[0] + 8)
    torch.testing.assert_close(there[2], here[2])


@pytest.mark.parametrize("quantize", [lambda x, s: lsq(x, s, -4, 3), lambda x, s: lsq_offset(x, s, -0.4 + 0 * s, 7)])
def test_a_negative_step_is_used_as_a_positive_one_and_its_gradient_has_the_other_sign(quantize):
    x, step = torch.randn(500), torch.tensor(0.2)
    output, _, (grad_x, grad_step) = gradients(quantize, x, step)
    same_output, _, (same_x, other_step) = gradients(quantize, x, -step)
    assert torch.equal(output, same_output) and torch.equal(grad_x, same_x)
    assert other_step.item() == pytest.approx(-grad_step.item(), rel=1e-12) and grad_step != 0


@pytest.mark.parametrize("value", [-0.3, 0.0, 1e-20])
def test_with_an_offset_too_the_step_stays_positive(value):
    quantizer, x = LSQActivation(4, offset=True), torch.randn(4, 10)
    quantizer.calibrate(x)
    with torch.no_grad():
        quantizer.step.fill_(value)
    assert quantizer.step_size() > 0
    output = quantizer(x)
    output.sum().backward()
    assert output.isfinite().all() and quantizer.step.grad.isfinite() and quantizer.offset.grad.isfinite()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_calibration_puts_the_lowest_level_at_the_smallest_value(bits):
    x = torch.nn.functional.silu(2 * torch.randn(16, 200))
    quantizer = LSQActivation(bits, offset=True)
    with pytest.raises(RuntimeError, match="calibrate"):
        quantizer(x)
    quantizer.calibrate(x)
    levels = 2**bits - 1
    assert quantizer.signed and quantizer.levels() == levels
    assert quantizer.offset.item() == x.min().item()
    expected = 2 * (x - x.min()).mean().item() / math.sqrt(levels)
    assert quantizer.step.item() == pytest.approx(expected, rel=1e-5)
    output = quantizer(x)
    assert len(output.unique()) <= 2**bits
    assert output.min().item() == x.min().item()
    assert output.max().item() <= quantizer.offset.item() + levels * quantizer.step.item() + 1e-5


def test_an_offset_covers_silu_better_than_signed_levels():
    """At 2 bits signed levels are -2, -1, 0 and 1 steps: half of them for values above -0.28."""
    x = torch.nn.functional.silu(2 * torch.randn(64, 200, generator=torch.Generator().manual_seed(0)))
    error = {}
    for offset in (False, True):
        quantizer = LSQActivation(2, offset=offset)
        quantizer.calibrate(x)
        error[offset] = (quantizer(x) - x).square().mean().item()
    assert error[True] < 0.7 * error[False]


def test_the_gradient_scale_of_an_offset_is_that_of_the_step():
    def scale_gradients(batch):
        quantizer = LSQActivation(4, offset=True)
        quantizer.calibrate(torch.rand(2, 5, generator=torch.Generator().manual_seed(0)))
        quantizer(torch.full((batch, 5), 100.0)).sum().backward()  # far outside: Q_P and 1 from every element
        return quantizer.step.grad.item(), quantizer.offset.grad.item()

    for batch in (1, 8):
        expected = batch * 5 / math.sqrt(5 * 15)
        assert scale_gradients(batch) == (pytest.approx(15 * expected), pytest.approx(expected))


def test_without_an_offset_there_is_no_parameter_for_it():
    assert [name for name, _ in LSQActivation(4).named_parameters()] == ["step"]
    assert [name for name, _ in LSQActivation(4, offset=True).named_parameters()] == ["step", "offset"]


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(2, 8), seed=st.integers(0, 99), scale=st.floats(0.01, 10), offset=st.floats(-1, 1))
def test_the_fused_functions_are_the_plain_formulas(bits, seed, scale, offset):
    """Values and all gradients in double precision: what is fast is what can be read."""
    generator = torch.Generator().manual_seed(seed)
    x, upstream = torch.randn(2, 4, 3, 5, 5, generator=generator, dtype=torch.float64)
    scale, offset = torch.tensor([scale, offset], dtype=torch.float64)
    half = 2 ** (bits - 1)
    for fused, formula, inputs, constants in [
        (lsq, lsq_formula, (x, scale), (-half, half - 1, 0.3)),
        (lsq_offset, lsq_offset_formula, (x, scale, offset), (2 * half - 1, 0.3)),
        (clipped_uniform, clipped_uniform_formula, (x, scale), (half - 1, False)),
        (clipped_uniform, clipped_uniform_formula, (x, scale), (half - 1, True)),
    ]:
        results = []
        for function in (fused, formula):
            leaves = [value.clone().requires_grad_() for value in inputs]
            output = function(*leaves, *constants)
            results.append((output, *torch.autograd.grad(output, leaves, upstream)))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
