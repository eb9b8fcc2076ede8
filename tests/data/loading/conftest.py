"""A picture that shows every way to resample it wrongly."""

import cv2
import numpy as np
import pytest


@pytest.fixture(scope="session")
def picture() -> tuple[np.ndarray, np.ndarray]:
    """An image with edges and texture at many scales, 137 x 181, and a mask of blobs, both read-only."""
    rng = np.random.default_rng(5)
    image = np.zeros((137, 181, 3), np.float64)
    for cells in (4, 16, 64):
        noise = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        image += cv2.resize(noise, (181, 137), interpolation=cv2.INTER_CUBIC).astype(float) / 3
    mask = cv2.resize(rng.integers(0, 5, (9, 12), np.uint8), (181, 137), interpolation=cv2.INTER_NEAREST)
    mask[mask == 4] = 255
    image = image.clip(0, 255).astype(np.uint8)
    for array in (image, mask):
        array.setflags(write=False)
    return image, mask
