"""The corruptions in a pipeline of torchvision: a transform, and a data set around another one. Needs torchvision."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from qreg_utils.corruptions import corrupt


class Corrupt(v2.Transform):
    """``Corrupt("snow", severity=3)``: a transform of PIL images (RGB) and of uint8 images (..., 3, H, W), H and W at
    least 32; labels, boxes and masks beside them pass through.

    ``family`` names the constants: "imagenet" for photographs, "cifar" for 32x32 pixels. Without a ``seed`` each call
    draws its random numbers from torch's generator; with one every call draws the same. Raises TypeError or ValueError
    as ``qreg_utils.corruptions.corrupt`` does, for its arguments when it is made.
    """

    _transformed_types = (Image.Image, tv_tensors.Image, v2.functional.is_pure_tensor)

    def __init__(self, name: str, severity: int, *, family: str = "imagenet", seed: int | None = None):
        super().__init__()
        self.name, self.severity, self.family, self.seed = name, severity, family, seed
        corrupt(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), name, severity, family=family, seed=seed or 0)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The seed of a call, the same for all images in it."""
        return {"seed": int(torch.randint(2**31, ())) if self.seed is None else self.seed}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """An image, corrupted; of the kind that it was."""
        if isinstance(inpt, Image.Image):
            return to_pil_image(self._corrupted(pil_to_tensor(inpt), params["seed"]))
        corrupted = self._corrupted(inpt.as_subclass(Tensor), params["seed"])
        return tv_tensors.wrap(corrupted, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else corrupted

    def _corrupted(self, images: Tensor, seed: int) -> Tensor:
        batch = images.reshape(-1, *images.shape[-3:])
        return corrupt(batch, self.name, self.severity, seed=seed, family=self.family).reshape(images.shape)

    def extra_repr(self) -> str:
        return f"{self.name!r}, severity={self.severity}, family={self.family!r}, seed={self.seed}"


class CorruptedDataset(Dataset):
    """``dataset`` with the first part of each item, a PIL image or uint8 (3, H, W), corrupted, the same way each time:
    what is drawn depends on ``seed`` and on the item's position. ``transform`` is applied after that, to the image."""

    def __init__(
        self, dataset: Sequence, name: str, severity: int, *, family: str = "imagenet", seed: int = 0, transform=None
    ):
        Corrupt(name, severity, family=family, seed=seed)
        self.dataset, self.transform = dataset, transform
        self.name, self.severity, self.family, self.seed = name, severity, family, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        image, *rest = self.dataset[index]
        batch = (pil_to_tensor(image) if isinstance(image, Image.Image) else image)[None]
        options = {"seed": self.seed, "family": self.family, "first_image": index % len(self)}
        (corrupted,) = corrupt(batch, self.name, self.severity, **options)
        corrupted = to_pil_image(corrupted) if isinstance(image, Image.Image) else corrupted
        return (self.transform(corrupted) if self.transform else corrupted, *rest)
