import pytest
import torch

from qreg_utils.models import MODELS, build_model

# by hand, for 10 classes: convolutions 3*16*9 + per stage, two numbers for each batch-norm channel, the linear layer
PARAMETERS = {"resnet8": 78_042, "resnet20": 269_722}


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
