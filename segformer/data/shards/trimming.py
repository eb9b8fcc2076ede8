"""`data.min_share`: training images in which `data.drop_classes` have too small a share are left out.

The share is of all pixels, ignored ones included, after the label map. Splits named val... or test... stay
whole. Every mask of the others is read, in processes."""

import numpy as np

from segformer.data.shards.pool import run
from segformer.data.sources.dataset import DatasetConfig, label_table
from segformer.data.sources.division import is_training
from segformer.data.sources.sample import Sample, inspect_sample, sample_ids
from segformer.errors import DataError

SCAN = 64  # images that one task looks at

Listing = dict[str, list[Sample]]  # by split


def trim(cfg: DatasetConfig, listing: Listing, workers: int) -> Listing:
    """The listing without the images to leave out, whose number is printed; DataError when none is left."""
    kept = dict(listing)
    for split in filter(is_training, listing if cfg.min_share else ()):
        samples = listing[split]
        tasks = [(cfg, samples[start : start + SCAN]) for start in range(0, len(samples), SCAN)]
        images = [len(part) for _, part in tasks]
        wanted = run(_wanted, tasks, images=images, workers=workers, desc="scanning")
        kept[split] = [sample for part in wanted for sample in part]
        print(
            f"{split}: {len(samples) - len(kept[split])} of {len(samples)} images are left out "
            f"({', '.join(cfg.drop_classes)} below {100 * cfg.min_share:g} % of the pixels)"
        )
        if not kept[split]:
            raise DataError(f"data.min_share={cfg.min_share} leaves no image of {split}; lower it")
    return kept


def _wanted(task: tuple[DatasetConfig, list[Sample]]) -> list[Sample]:
    cfg, samples = task
    counted = np.isin(label_table(cfg), [cfg.classes.index(name) for name in cfg.drop_classes])  # by raw id
    shares = [counted[_ids(cfg, sample)].mean() for sample in samples]
    return [sample for sample, share in zip(samples, shares, strict=True) if share >= cfg.min_share]


def _ids(cfg: DatasetConfig, sample: Sample) -> np.ndarray:
    if sample.shapes is None:  # the image's size tells nothing then
        return sample_ids(cfg, sample, (0, 0))
    loaded, defects = inspect_sample(cfg, sample)
    if loaded.ids is None:
        raise defects[0]
    return loaded.ids
