"""ResNets (He et al. 2015, arXiv 1512.03385) for small images: a 3x3 stem of stride 1, and no early pooling."""

from torch import Tensor, nn
from torch.nn import functional as F


class PaddedShortcut(nn.Module):
    """The paper's option A, without parameters: subsample, and fill the new channels with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before)) if self.new_channels else x


class ProjectedShortcut(nn.Sequential):
    """The paper's option B: a 1x1 convolution and batch norm where the shape changes, else the identity."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        if stride > 1 or in_channels != out_channels:
            self.conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.bn = nn.BatchNorm2d(out_channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, from ``in_channels`` to ``width`` channels."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: type[nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, to four times ``width`` channels; the 3x3 has the stride, as in torchvision."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: type[nn.Module]):
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Images (N, 3, H, W) to logits (N, num_classes).

    ``stages`` lists (blocks, width); every stage but the first begins with a stride of 2, so that 32x32 images end
    at 8x8 after three stages and at 4x4 after four. The stem may have a stride, too, and ``standardise`` gives each
    image a mean of 0 and a variance of 1 first.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        shortcut: type[nn.Module],
        stages: list[tuple[int, int]],
        num_classes: int,
        stem_stride: int = 1,
        standardise: bool = False,
    ):
        super().__init__()
        channels = stages[0][1]
        self.standardise = nn.GroupNorm(1, 3, affine=False) if standardise else nn.Identity()
        self.conv1 = nn.Conv2d(3, channels, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        for count, width in stages:
            stride = 2 if len(self.blocks) else 1
            for s in [stride] + [1] * (count - 1):
                self.blocks.append(block(channels, width, s, shortcut))
                channels = width * block.expansion
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.standardise(x))))
        x = self.blocks(x)
        return self.fc(x.mean(dim=(2, 3)))


def cifar_resnet(n: int, num_classes: int) -> ResNet:
    """The 6n+2 layers of the paper's section 4.2: 16-32-64 channels, shortcuts without parameters."""
    return ResNet(BasicBlock, PaddedShortcut, [(n, 16), (n, 32), (n, 64)], num_classes)


def small_resnet8(num_classes: int) -> ResNet:
    """ResNet-8 for a laptop: a step takes a quarter of the time. That each image is standardised keeps networks of
    different seeds alike under corruptions that shift its level (fog, brightness, contrast)."""
    stages = [(1, 16), (1, 32), (1, 64)]
    return ResNet(BasicBlock, PaddedShortcut, stages, num_classes, stem_stride=2, standardise=True)


def resnet18(num_classes: int) -> ResNet:
    return ResNet(BasicBlock, ProjectedShortcut, [(2, 64), (2, 128), (2, 256), (2, 512)], num_classes)


def resnet50(num_classes: int) -> ResNet:
    return ResNet(Bottleneck, ProjectedShortcut, [(3, 64), (4, 128), (6, 256), (3, 512)], num_classes)
