import pytest
import torch

from qreg_utils.models import MODELS, build_model

# ResNet-20: He et al.'s 0.27 M. ResNet-8 by hand: a convolution 3-16, two convolutions in each of three stages, two
# numbers for each batch-norm channel, and the linear layer; shortcuts have no parameters.
STAGES = 2 * 9 * 16 * 16 + 9 * (16 * 32 + 32 * 32) + 9 * (32 * 64 + 64 * 64)
PARAMETERS = {"resnet8": 9 * 3 * 16 + STAGES + 2 * (3 * 16 + 2 * 32 + 2 * 64) + 650, "resnet20": 269_722}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_the_known_one(name):
    assert sum(p.numel() for p in build_model(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_shapes(name):
    model = build_model(name, num_classes=7)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_a_seed_fixes_the_weights_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    first, second, other = (build_model("resnet8", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.conv1.weight, second.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"'resnet19'.*resnet20"):
        build_model("resnet19")
    with pytest.raises(ValueError, match="num_classes=1"):
        build_model("resnet8", num_classes=1)
