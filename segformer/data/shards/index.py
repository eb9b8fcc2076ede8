"""The index of a split: where each member of each tar lies, and what a reader can know without decoding.

    header      JSON {"samples": N, "labels": M, "key_bytes": n}, spaces, newline; 64 bytes or a multiple
    INDEX[N]    place, size and crc32 of both members, the image's size
    LABELS[M]   the class histogram of each sample without 255, ids ascending; sample i owns
                [labels_end[i - 1], labels_end[i])
    keys        joined by newlines; key_end[i] is the end of key i

Numbers are little endian and packed. The file is read, never parsed sample by sample; all checks are on whole
arrays, and none adds numbers that it hasn't bounded."""

import json
from itertools import accumulate
from typing import Any

import numpy as np

from segformer.data.sources.dataset import MAX_FILE_BYTES, MAX_PIXELS
from segformer.files import parse_json

INDEX = np.dtype(
    [
        ("image_offset", "<i8"),
        ("image_size", "<i8"),
        ("target_offset", "<i8"),
        ("target_size", "<i8"),
        ("key_end", "<i8"),
        ("labels_end", "<i8"),
        ("image_crc", "<u4"),
        ("target_crc", "<u4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("max_label", "<i4"),
    ]
)
LABELS = np.dtype([("label", "<u2"), ("pixels", "<u4")])
HEADER_STEP = 64  # bytes; the header is a multiple of it
NOT_AN_INDEX = (ValueError, KeyError, TypeError, OverflowError)  # what parsing other bytes raises
BLOCK = 2**16  # samples whose histograms are checked at a time


def index_header(samples: int, labels: int, key_bytes: int) -> bytes:
    """The first line of an index file."""
    line = json.dumps({"samples": samples, "labels": labels, "key_bytes": key_bytes}).encode()
    return line + b" " * (-(len(line) + 1) % HEADER_STEP) + b"\n"


def parse_index(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of an index, uint8 -> views (INDEX, LABELS, bytes of the keys); NOT_AN_INDEX when torn."""
    line = raw[: 4 * HEADER_STEP].tobytes().partition(b"\n")[0]
    header = parse_json(line)
    samples, labels, key_bytes = (int(header[key]) for key in ("samples", "labels", "key_bytes"))
    ends = list(accumulate([len(line) + 1, samples * INDEX.itemsize, labels * LABELS.itemsize, key_bytes]))
    if samples < 1 or labels < 0 or key_bytes < 1 or len(raw) != ends[-1]:
        raise ValueError("it is torn")
    return raw[ends[0] : ends[1]].view(INDEX), raw[ends[1] : ends[2]].view(LABELS), raw[ends[2] :]


def image_sums(records: np.ndarray) -> np.ndarray:
    """Size and crc32 of each image in one number, int64 (samples,): equal for equal images."""
    sums: np.ndarray = records["image_size"] << 32 | records["image_crc"]
    return sums


def pack_index(records: np.ndarray, labels: np.ndarray, keys: bytes) -> bytes:
    """The bytes of an index."""
    header = index_header(len(records), len(labels), len(keys))
    return header + records.tobytes() + labels.tobytes() + keys


def _labels_are_sane(
    records: np.ndarray, labels: np.ndarray, pixels: np.ndarray, class_pixels: np.ndarray, task: str
) -> bool:
    """Ids ascending and below K, no more pixels than the image has, totals those of dataset.json."""
    totals = np.zeros_like(class_pixels)
    ends = np.concatenate([[0], records["labels_end"]])
    for first in range(0, len(records), BLOCK):
        block = slice(first, first + BLOCK)
        own = ends[first : first + BLOCK + 1]
        part = labels[own[0] : own[-1]]
        label, count, own = part["label"].astype(np.int64), part["pixels"].astype(np.int64), own - own[0]
        if (label >= len(totals)).any():
            return False
        np.add.at(totals, label, count)
        sums = np.diff(np.concatenate([[0], np.cumsum(count)])[own])
        rising = np.diff(label) > 0
        inner = own[1:-1]
        rising[inner[(inner > 0) & (inner < len(label))] - 1] = True  # from one sample to the next
        highest = np.where(np.diff(own) > 0, np.append(label, -1)[own[1:] - 1], -1)
        sane = (
            (count > 0).all()
            and rising.all()
            and (highest == records["max_label"][block]).all()
            and (sums <= pixels[block] if task == "segmentation" else sums == 1).all()
        )
        if not sane:
            return False
    return bool((totals == class_pixels).all())


def is_sane(parts: tuple[np.ndarray, np.ndarray, np.ndarray], entry: dict[str, Any], task: str) -> bool:
    """Check what a reader relies on for every sample, and the totals against dataset.json.

    parts: (records, labels, keys). entry: that of the split in dataset.json.
    """
    shard_sizes, shard_bytes = ([shard[key] for shard in entry["shards"]] for key in ("samples", "bytes"))
    tar_bytes = np.repeat(np.array(shard_bytes, np.int64), shard_sizes)
    class_pixels = np.array(entry["class_pixels"], np.int64)
    records, labels, keys = parts
    pixels = records["height"].astype(np.int64) * records["width"]
    target_end = records["target_offset"] + records["target_size"]
    free_from = np.concatenate([[0], target_end[:-1]])
    free_from[np.cumsum([0, *shard_sizes[:-1]])] = 0  # each shard begins anew
    ends = np.concatenate([[0], records["labels_end"]])
    key_starts = np.concatenate([[0], records["key_end"][:-1] + 1])
    places = ("image_offset", "image_size", "target_offset", "target_size")
    sane = (
        all(((records[place] >= 0) & (records[place] <= tar_bytes)).all() for place in places)
        and (records["image_offset"] >= free_from).all()
        and (records["image_size"] > 0).all()
        and (records["target_offset"] > records["image_offset"] + records["image_size"]).all()
        and (records["target_size"] > 0).all()
        and (target_end <= tar_bytes).all()
        and (target_end - records["image_offset"] <= 3 * MAX_PIXELS + MAX_FILE_BYTES).all()
        and (records["height"] > 0).all()
        and (records["width"] > 0).all()
        and (pixels <= MAX_PIXELS).all()
        and (ends[1:] >= ends[:-1]).all()
        and ends[-1] == len(labels)
        and (records["key_end"] > key_starts).all()
        and records["key_end"][-1] == len(keys)
        and np.array_equal(np.flatnonzero(keys == ord("\n")), records["key_end"][:-1])
    )
    return bool(sane and _labels_are_sane(records, labels, pixels, class_pixels, task))
