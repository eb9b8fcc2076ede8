"""The samples of a folder, where a test needs no defects."""

from pathlib import Path

from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.listing import find_samples
from segformer.data.sources.sample import Sample


def list_samples(cfg: DatasetConfig, root: Path, split: str) -> list[Sample]:
    """Every sample of a split, sorted by key; the first defect of its folders is raised."""
    samples, defects, _ = find_samples(cfg, root, split)
    if defects:
        raise defects[0]
    return samples
