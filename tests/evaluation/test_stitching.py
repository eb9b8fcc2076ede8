"""Whole images from the logits of their tiles, against the sliding windows of the whole images."""

import numpy as np
import pytest
import torch
from small import CLASSES, small

from segformer.data.shards.tiling import TiledSplit, Tiling
from segformer.errors import ConfigError
from segformer.evaluation.inference_mode import InferenceMode, InferenceModeConfig
from segformer.evaluation.stitching import Stitching

# Larger than a tile, not divisible, as large as one, smaller in one side, in both.
SIZES = [(131, 170), (64, 64), (50, 200), (200, 41), (33, 40), (97, 65)]


def tiled(sizes, tiling):
    images, heights, widths = [], [], []
    for key, size in enumerate(sizes):
        images.append([str(key), *size, len(heights)])
        for _ in tiling.windows(size):
            heights.append(min(size[0], tiling.tile[0]))
            widths.append(min(size[1], tiling.tile[1]))
    entry = {"tile": list(tiling.tile), "stride": list(tiling.stride), "images": images}
    return TiledSplit.parse(entry, np.array(heights), np.array(widths))


@pytest.mark.parametrize("stride", [(48, 48), (64, 64), (17, 30)], ids=str)
def test_stitched_logits_are_bit_by_bit_those_of_sliding_windows(stride):
    split = tiled(SIZES, Tiling((64, 64), stride))
    mode = InferenceMode(small().eval(), InferenceModeConfig(window=[64, 64], stride=list(stride)))
    stitching = Stitching(split)
    for image in split.images:
        picture = torch.randn(1, 3, image.height, image.width)
        target = torch.randint(CLASSES, (1, image.height, image.width), dtype=torch.uint8)
        found, labels = [], []
        for index, (rows, columns) in enumerate(split.tiling.windows((image.height, image.width))):
            logits = mode(picture[:, :, rows, columns].contiguous())
            for part, own, _ in stitching.add([image.first + index], logits, target[:, rows, columns]):
                assert part.shape[3] <= 64  # counting takes the square of the width
                found.append(part.clone())
                labels.append(own.clone())
        across = -(-image.width // 64)
        lines = range(0, len(found), across)
        assert torch.equal(
            torch.cat([torch.cat(found[at : at + across], 3) for at in lines], 2), mode(picture)
        )
        assert torch.equal(torch.cat([torch.cat(labels[at : at + across], 2) for at in lines], 1), target)


def test_no_more_is_held_than_one_row_of_tiles():
    split = tiled([(1000, 80)], Tiling((64, 64), (48, 48)))
    stitching, peak = Stitching(split), 0
    for index in range(len(split.tiling.windows((1000, 80)))):
        list(stitching.add([index], torch.zeros(1, 2, 64, 64), torch.zeros(1, 64, 64)))
        peak = max(peak, sum(part.numel() for part in stitching._held))
    assert peak == (2 + 1 + 1) * 64 * 80


def test_ranks_get_whole_images_and_about_as_many_tiles():
    split = tiled([(64, 64)] * 5 + [(500, 64), (64, 500), (300, 64)], Tiling((64, 64), (64, 64)))
    owners = split.owners(2)
    for image, end in zip(split.images, split.ends, strict=True):
        assert len(set(owners[image.first : end])) == 1
    assert abs(np.bincount(owners)[0] - np.bincount(owners)[1]) <= 1


@pytest.mark.parametrize(
    "change",
    [{"stride": [0, 1]}, {"stride": [65, 64]}, {"images": [["0", 64, 64, 1]]}, {"images": []},
     {"images": [["0", 2**20, 2**20, 0]]}, {"images": [["0", 64, 65, 0]]}, {"images": 3}],
    ids=str,
)  # fmt: skip
def test_a_list_of_images_that_does_not_fit_the_samples_is_refused(change):
    entry = {"tile": [64, 64], "stride": [64, 64], "images": [["0", 64, 64, 0]]} | change
    with pytest.raises((ValueError, TypeError)):
        TiledSplit.parse(entry, np.array([64]), np.array([64]))


def test_other_windows_than_the_tiles_are_refused_in_one_line():
    from segformer.evaluation.inference_mode import of_tiles

    tiling = Tiling((64, 64), (48, 48))
    for fitting in (InferenceModeConfig(), InferenceModeConfig(window=[64, 64])):
        assert of_tiles(fitting, tiling) == InferenceModeConfig(window=[64, 64], stride=[48, 48])
    message = r"^flip=True: the split was cut into tiles, which are its windows 64 stride 48; leave this out"
    with pytest.raises(ConfigError, match=message):
        of_tiles(InferenceModeConfig(flip=True), tiling)
