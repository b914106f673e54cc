"""MobileNetV1 for small images (Howard et al. 2017, arXiv 1704.04861, table 1)."""

from torch import Tensor, nn
from torch.nn import functional as F

# channels and stride of each block
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


class SeparableBlock(nn.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class MobileNetV1(nn.Module):
    """Images (N, 3, H, W) to logits (N, num_classes).

    As usual for CIFAR only the stem differs from the paper's: stride 1 in place of 2. The four strides of 2 that
    follow take 32x32 images to 2x2, which the average pooling joins.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        channels = 32
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        for out_channels, stride in BLOCKS:
            self.blocks.append(SeparableBlock(channels, out_channels, stride))
            channels = out_channels
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.blocks(x)
        return self.fc(x.mean(dim=(2, 3)))
