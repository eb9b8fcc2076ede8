"""What launch/evaluate.py measures of masks beside the confusion matrix, image by image.

    areas        (N, 3, K) of every image, from which intervals, pairs and the worst images follow
    boundary     (3, K) over all images: boundary.py                   where it is asked for
    calibration  (3, 15) over all pixels: calibration.py               where it is asked for
    worst        the images with the lowest mIoU, drawn while they pass

All are integers: sums over the ranks are exact.

Shapes: N images (of a tiled split whole ones), K classes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from segformer.data.loading.samples import Batch
from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.distributed.world import World
from segformer.evaluation.bootstrap import areas_of, mean_iou
from segformer.evaluation.boundary import boundary_areas
from segformer.evaluation.calibration import BINS, calibration_counts
from segformer.evaluation.drawing import drawn_sample
from segformer.models.ops.argmax import upsample_argmax, upsample_confusion

Drawn = tuple[float, int, np.ndarray, np.ndarray]
"mIoU, image, picture and the classes in it."


class Measures:
    """Counts of the images of one rank, after `sum` of all."""

    def __init__(
        self,
        images: int,
        classes: int,
        *,
        folded: Callable[[Tensor], Tensor] = lambda counts: counts,
        boundary: bool = False,
        calibration: bool = False,
        probabilities: bool = False,
        left_out: Sequence[int] = (),
        drawn: int = 0,
        palette: np.ndarray | None = None,
    ) -> None:
        """folded: confusion matrix of the network's classes -> that of the `classes`. left_out: of means.
        drawn: how many of the worst images to draw, in the colors of the palette."""
        self.areas = np.zeros((images, 3, classes), np.int64)
        self.boundary = np.zeros((3, classes), np.int64) if boundary else None
        self.calibration = np.zeros((3, BINS), np.int64) if calibration else None
        self.worst: list[Drawn] = []
        self._folded, self._probabilities, self.left_out = folded, probabilities, list(left_out)
        self._drawn, self.palette = drawn, palette

    def count(self, logits: Tensor, target: Tensor, ids: Sequence[int]) -> Tensor:
        """See metrics.Count."""
        total = logits.new_zeros(logits.shape[1], logits.shape[1], dtype=torch.int64)
        for index, one, label in zip(ids, logits.split(1), target.split(1), strict=True):
            counts = upsample_confusion(one, label, IGNORE_INDEX)
            total += counts
            self.areas[index] += areas_of(self._folded(counts).cpu().numpy())
            if self.boundary is not None:
                mask = upsample_argmax(one, (label.shape[1], label.shape[2]))[0].cpu().numpy()
                self.boundary += boundary_areas(label[0].cpu().numpy(), mask, self.areas.shape[2])
            if self.calibration is not None:
                found = calibration_counts(one, label, probabilities=self._probabilities)
                self.calibration += found.numpy()
        return total

    def draw(self, batch: Batch, logits: Tensor) -> None:
        """Draw the images of a batch that has been counted that are among the worst so far."""
        for row, index in enumerate(
            batch.sample_ids.tolist() if self._drawn and self.palette is not None else ()
        ):
            score = float(mean_iou(self.meant(self.areas[index])))
            if score == score and (len(self.worst) < self._drawn or (score, index) < self.worst[-1][:2]):
                assert self.palette is not None
                self._keep([(score, index, *drawn_sample(batch, logits, row, self.palette))])

    def sum(self, world: World) -> None:
        """Add up those of all ranks; all ranks."""
        for counts in (self.areas, self.boundary, self.calibration):
            if counts is not None:
                counts[:] = world.sum(torch.from_numpy(counts).to(world.device, copy=True)).cpu().numpy()
        everyone, self.worst = world.gather(self.worst), []
        self._keep([one for found in everyone for one in found])

    def _keep(self, more: list[Drawn]) -> None:
        self.worst = sorted(self.worst + more, key=lambda one: one[:2])[: self._drawn]

    def meant(self, areas: np.ndarray) -> np.ndarray:
        """Areas (..., K) without the classes that means leave out."""
        return np.delete(areas, self.left_out, axis=-1)

    def scores(self, areas: np.ndarray | None = None) -> np.ndarray:
        """mIoU of each image (N,), or of other areas (N, 3, K); NaN where there is nothing."""
        return mean_iou(self.meant(self.areas if areas is None else areas))
