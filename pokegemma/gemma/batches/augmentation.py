"""Change the colours of training pictures, and add noise; the buttons stay right. Nothing is mirrored, moved or cut."""

import hashlib
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from PIL import Image


@dataclass
class Augmentation:
    """Random changes of pictures that keep the label valid: "left" in a mirrored picture would be wrong.

    A picture gets the same changes whenever it is read in an epoch, in any process and after a resume, and others in
    the next epoch. Features of a cache cannot be augmented: they are those of the recorded picture.

    Attributes:
        colour: each colour channel is multiplied by a factor of 1 - `colour` to 1 + `colour`, and brighter or darker
            by up to `colour` of the range.
        noise: standard deviation of the noise of each pixel, as a share of the range.
        seed: of the run.
        epoch: which the trainer counts.
    """

    colour: float = 0.0
    noise: float = 0.0
    seed: int = 0
    epoch: int = 0

    def apply(self, image: Image.Image, path: str) -> Image.Image:
        """Return an RGB picture with the changes that this run and epoch give to the picture of this path."""
        name = "/".join(PurePath(path).parts[-2:])  # a folder that was moved is the same dataset
        key = hashlib.sha256(f"{self.seed} {self.epoch} {name}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(key[:8]))
        pixels = np.asarray(image, np.float32)
        factors = random.uniform(1 - self.colour, 1 + self.colour, 3).astype(np.float32)
        pixels = pixels * factors + np.float32(255 * random.uniform(-self.colour, self.colour))
        if self.noise:
            pixels += random.normal(0, 255 * self.noise, pixels.shape).astype(np.float32)
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
