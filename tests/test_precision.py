"""float32 means IEEE float32 on every device, bfloat16 what autocast does, and nothing is left switched."""

import pytest
import torch

from qreg_utils.models import build_model
from qreg_utils.precision import ieee_float32
from qreg_utils.quantize import quantize_model, quantized_layers
from qreg_utils.recipe import ClassificationRecipe
from qreg_utils.theory.penalty import penalty_rows
from qreg_utils.theory.sharpness import sharpness
from qreg_utils.training import fit, measure

RECIPE = {"epochs": 1, "batch_size": 32, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
RECIPE |= {"alpha_decay": 5e-4, "schedule": "one-cycle", "augment": False, "compile": False}


def tf32():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(params=["old", "new"])
def switched_on(request):
    """TF32 everywhere, by PyTorch's old or new names; afterwards its defaults again."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.conv.fp32_precision
    if request.param == "old":
        matmul.allow_tf32 = cudnn.allow_tf32 = True
    else:
        matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32"
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = False, True
    assert before == (matmul.fp32_precision, cudnn.conv.fp32_precision) or before[0] == "none"


def watched(model, seen):
    """``model``, which adds to ``seen`` whether TF32 is allowed, and the type of its first convolution's outputs."""
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.append((*tf32(), output.dtype)))
    return model


def network(seen, method=None):
    model = build_model("resnet8", 10, seed=0)
    return watched(quantize_model(model, method, 4, 4) if method else model, seen)


def use(model, data, name):
    inputs, labels = data.normalise(data.train_images[:8]), data.train_labels[:8]
    if name == "fit":
        fit(model, data, ClassificationRecipe(**RECIPE), seed=0)
    elif name == "measure":
        measure(model, data, data.test_images, data.test_labels)
    elif name == "penalty":
        penalty_rows(model, inputs, labels, seed=0, draws=1, probes=1)
    else:
        sharpness(model, inputs, labels, draws=1, probes=1)


@pytest.mark.parametrize("name", ["fit", "measure", "penalty", "sharpness"])
def test_float32_is_no_tf32_whatever_was_switched_on_before(tiny, switched_on, name):
    seen = []
    use(network(seen), tiny, name)
    assert set(seen) == {(False, False, torch.float32)}
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_after_an_error_it_is_as_before(switched_on):
    with pytest.raises(ZeroDivisionError), ieee_float32():
        raise ZeroDivisionError
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.parametrize("method", [None, "lsq"])
def test_bfloat16_is_for_full_precision_and_quantized_alike_and_only_for_training(tiny, method):
    """float32 networks and their quantizers; what the layers return is in bfloat16, but not where it is measured."""
    seen = []
    model = network(seen, method)
    result = fit(model, tiny, ClassificationRecipe(**RECIPE, precision="bfloat16"), seed=0)
    assert result["precision"] == "bfloat16"
    types = [dtype for *_, dtype in seen]
    assert types.count(torch.bfloat16) == 3 and set(types) == {torch.bfloat16, torch.float32}  # batches, and others
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(layer.quantized_weight().dtype == torch.float32 for _, layer in quantized_layers(model))
    other = fit(network([], method), tiny, ClassificationRecipe(**RECIPE), seed=0)
    assert other["precision"] == "float32" and other["history"][0]["loss"] != result["history"][0]["loss"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_float32_convolutions_are_as_exact_as_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 64, 16, 16, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    with ieee_float32():
        error = (torch.nn.functional.conv2d(x.cuda(), weight.cuda()).cpu().double() - exact).norm() / exact.norm()
    assert error < 1e-6  # 3e-4 in TF32
