"""Uploads that wait for the model: one thread owns it, and takes those of one size together.

Each upload has a turn of the thread, in the order in which they came. Its turn takes what waits and has the
same size in its header along, up to `batch` images, so that the later turns find their answer. An error of
the network belongs to the turn that met it; the others are predicted in their own.
"""

import struct
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np

from segformer.data.sources.picture import size_of
from segformer.errors import DataError, reported
from segformer.inference.photograph import from_bytes
from segformer.inference.predictor import Prediction, Predictor

UPLOAD = Path("upload")
"What messages call an upload; the name that came with it is never used."


@dataclass(slots=True, eq=False)
class _Job:
    """An upload, and its answer once it is known."""

    data: bytes
    kind: tuple[int, int, bool] | None
    """Height, width and whether the confidence is to be kept; None: not known before it is decoded."""
    keep: tuple[str, ...]
    answer: Prediction | DataError | None = None


class Batcher:
    """A predictor in a thread of its own."""

    def __init__(self, predictor: Predictor, batch: int, most: int) -> None:
        """batch: images that go through the network together. most: their pixels in all, and those of one."""
        self.predictor, self._batch, self._most = predictor, batch, most
        self._thread = ThreadPoolExecutor(1, "model")
        self._waiting: dict[_Job, None] = {}  # in order
        self._lock = Lock()

    def submit(self, data: bytes, confidence: bool = False) -> "Future[Prediction]":
        """The prediction of an image file, without its image; the confidence is uint8, 255 = certain.

        The future raises DataError where the file is refused. Cancelled, an upload that waits is forgotten.
        """
        kind = None
        with suppress(ValueError, struct.error):  # its turn says what is wrong
            kind = (*size_of(data), confidence)
        job = _Job(data, kind, ("confidence",) if confidence else ())
        with self._lock:
            self._waiting[job] = None
        future = self._thread.submit(self._turn, job)
        future.add_done_callback(lambda _: self._forget(job))
        return future

    def close(self) -> None:
        """End the thread; what waits is not begun."""
        self._thread.shutdown(cancel_futures=True)

    def _forget(self, job: _Job) -> None:
        with self._lock:
            self._waiting.pop(job, None)

    def _turn(self, job: _Job) -> Prediction:
        if job.answer is None:
            self._predict(self._together(job))
        assert job.answer is not None
        if isinstance(job.answer, DataError):
            raise job.answer
        return job.answer

    def _together(self, job: _Job) -> list[_Job]:
        """The job whose turn it is, and those of its size that wait."""
        if job.kind is None:
            return [job]
        with self._lock:
            same = [one for one in self._waiting if one.kind == job.kind and one.answer is None]
        most = self._most // max(1, job.kind[0] * job.kind[1])
        return [job, *(one for one in same if one is not job)][: max(1, min(self._batch, most))]

    def _predict(self, jobs: Sequence[_Job]) -> None:
        model, sizes = self.predictor, dict[tuple[int, ...], list[tuple[_Job, np.ndarray]]]()
        for job in jobs:
            with reported(partial(setattr, job, "answer"), on=DataError):
                pixels = from_bytes(job.data, UPLOAD, model.image_range, model.pixels, self._most)
                sizes.setdefault(pixels.shape, []).append((job, pixels))  # EXIF may turn one
        for same in sizes.values():
            found = model.of_one_size([pixels for _, pixels in same], jobs[0].keep)
            for (job, _), one in zip(same, found, strict=True):
                sure = one.confidence
                job.answer = replace(
                    one,
                    image=np.empty((0, 0, 3), np.uint8),  # nobody needs it, and many may wait to be sent
                    confidence=None if sure is None else np.rint(255 * sure).astype(np.uint8),
                )
