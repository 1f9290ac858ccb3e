"""JPEG: rows go through JPEG compression before the model sees them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import BlackBox, Defense

from .transforms import Transformed


@dataclass(frozen=True)
class JPEG(Defense):
    """Guo et al. 2018, "Countering Adversarial Images using Input Transformations": each row is compressed and decompressed.

    Deterministic: rounded to 8 bits, encoded by libjpeg through Pillow (colour at half resolution), and decoded.

    Args:
        quality: of libjpeg, 1 to 95 (the paper: 75).

    Query cost: one row of the model behind it for each row.

    Raises:
        InputError: another quality; images of neither one channel nor three.
    """

    name: ClassVar[str] = "jpeg"

    quality: int = 75

    def __post_init__(self) -> None:
        if self.quality not in range(1, 96):
            raise InputError(f"quality of jpeg must be from 1 to 95, not {self.quality!r}")

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The black box behind the compression."""
        if box.input_shape is not None and box.input_shape[0] not in (1, 3):
            raise InputError(f"jpeg knows images of 1 or 3 channels, the model takes {box.input_shape[0]}")
        return Compressed(box, self)


class Compressed(Transformed):
    """A black box behind `JPEG`."""

    def __init__(self, inner: BlackBox, recipe: JPEG) -> None:
        super().__init__(inner, recipe)
        self._quality = recipe.quality

    def transform(self, rows: Tensor) -> Tensor:
        """Rows [n,C,H,W] as a client would get them back; on the host."""
        pixels = rows.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        back = np.stack([self._through(image) for image in pixels])
        return torch.from_numpy(back).to(rows.device).permute(0, 3, 1, 2).to(rows.dtype).div_(255).contiguous()

    def _through(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One image [H,W,C], 1 or 3 channels."""
        from PIL import Image

        if image.shape[2] not in (1, 3):
            raise InputError(f"jpeg knows images of 1 or 3 channels, not {image.shape[2]}")
        file = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, "JPEG", quality=self._quality)
        return np.asarray(Image.open(file)).reshape(image.shape)
