"""Which inputs predict finds, and what it writes of them beside masks and overlays."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from pycocotools import mask as coco_mask
from rasterio.transform import Affine

from segformer.errors import ConfigError, DataError, Incomplete
from segformer.inference.predict import predict
from segformer.inference.predicting import geotiff, tiled
from segformer.inference.predicting.inputs import find
from segformer.inference.predicting.outputs import regions
from segformer.inference.predicting.pipeline import ahead, same_size
from segformer.inference.predictor import Predictor
from tests.inference.test_predict_tiles import CLASSES, checkpoint, config, opened, picture  # noqa: F401


@pytest.fixture
def tree(tmp_path):
    """in/a.png, in/day/a.png, in/day/b.jpg, in/night/x.png and a note."""
    folder = tmp_path / "in"
    for seed, name in enumerate(("a.png", "day/a.png", "day/b.jpg", "night/x.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(40, 50 + 10 * (seed % 2), seed)).save(folder / name)
    (folder / "day/note.md").write_text("no picture")
    return folder


def below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_recursive_mirrors_the_folders_and_counts_what_is_not_used(checkpoint, tree, tmp_path, capsys):  # noqa: F811
    predict(config(checkpoint, tree, tmp_path / "out", recursive=True, save=["mask"], batch=2))
    assert below(tmp_path / "out") == ["a.png", "day/a.png", "day/b.png", "night/x.png"]
    assert "not used of input=" in (said := capsys.readouterr().out)
    assert "1 x .md (day/note.md)" in said
    predictor = Predictor(checkpoint, device="cpu")
    for name in ("a.png", "day/a.png", "night/x.png"):
        np.testing.assert_array_equal(opened(tmp_path / "out" / name)[0], predictor(tree / name).mask)


@pytest.mark.parametrize(
    ("text", "names", "base"),
    [
        ("in", ["in/a.png"], "in"),
        ("in/*/*.[pj]*", ["in/day/a.png", "in/day/b.jpg", "in/night/x.png"], "in"),
        ("in/**/a.png", ["in/a.png", "in/day/a.png"], "in"),
        ("[in/day,in/night/x.png]", ["in/day/a.png", "in/day/b.jpg", "in/night/x.png"], "in"),
        ("list.txt", ["in/night/x.png", "in/day/b.jpg"], "in"),
        ("lists/near.txt", ["lists/../in/a.png"], "in"),
        ("odd/[1] b, c.png", ["odd/[1] b, c.png"], "odd"),
    ],
)
def test_every_way_to_name_inputs_finds_the_same_files(tree, tmp_path, monkeypatch, text, names, base):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("in/night/x.png\n\nin/day/b.jpg\nin/night/x.png\n")
    Path("lists").mkdir()
    Path("lists/near.txt").write_text("../in/a.png\n")
    Path("odd").mkdir()
    Image.fromarray(picture(40, 40)).save("odd/[1] b, c.png")
    found, common, _ = find(text)
    assert [str(path) for path in found] == names
    assert common == (tmp_path / base if text != "lists/near.txt" else Path(os.path.abspath("in")))


def test_inputs_that_can_not_be_told_apart_or_lie_in_the_output_are_refused(checkpoint, tree, tmp_path):  # noqa: F811
    refused = [
        ({"recursive": True}, "in", tree / "out", ConfigError, "lies in the input folder"),
        ({}, "in/*.gif", tmp_path / "out", DataError, r"input=.*\*.gif holds no picture"),
        ({}, "[in, 3]", tmp_path / "out", ConfigError, "is no list of names"),
    ]
    os.symlink(tree / "day", tree / "day2")
    for settings, text, output, error, message in refused:
        source = text if text.startswith("[") else tmp_path / text
        with pytest.raises(error, match=message):
            predict(config(checkpoint, source, output, **settings))
    os.symlink(tree, tree / "night/loop")
    with pytest.raises(DataError, match="links to a folder that it lies in; remove the link"):
        predict(config(checkpoint, tree, tmp_path / "out", recursive=True))
    Image.fromarray(picture(40, 40)).save(tree / "day/a_confidence.jpg")
    with pytest.raises(DataError, match=r"day/a.png and .*a_confidence.jpg would both become"):
        predict(config(checkpoint, tree / "day", tmp_path / "out", save=["mask", "confidence"]))


def test_a_listed_file_that_is_not_there_is_skipped(checkpoint, tree, tmp_path):  # noqa: F811
    (tree / "list.txt").write_text("a.png\ngone.png\nday\n")
    with pytest.raises(Incomplete, match=r"2 of 3 pictures can't be used"):
        predict(config(checkpoint, tree / "list.txt", tmp_path / "out", save=["mask"]))
    assert below(tmp_path / "out") == ["a.png"]


def test_shares_of_the_network_are_written_as_they_are_said(checkpoint, tree, tmp_path):  # noqa: F811
    save = ["probabilities", "confidence", "entropy", "areas"]
    for settings in ({}, {"flip": True}, {"tile": 64, "overlap": 16}):
        source = tmp_path / "b.png"
        Image.fromarray(picture(90, 70)).save(source)
        predict(config(checkpoint, source, tmp_path / "out", save=save, **settings))
        shares = np.load(tmp_path / "out/b_probabilities.npy")
        assert (shares.dtype, shares.shape) == (np.float16, (len(CLASSES), 90, 70))
        np.testing.assert_allclose(shares.astype(np.float32).sum(0), 1, atol=3e-3)
        if "tile" not in settings:
            found = Predictor(checkpoint, device="cpu", **settings)(source, probabilities=True)
            np.testing.assert_allclose(shares, found.probabilities, atol=1e-3)
        exact = shares.astype(np.float64)
        confidence, entropy = (opened(tmp_path / f"out/b_{name}.png")[0] for name in save[1:3])
        assert np.abs(confidence - exact.max(0) * 255).max() <= 0.8
        bits = -(exact * np.log(np.maximum(exact, 1e-12))).sum(0) / np.log(len(CLASSES))
        assert np.abs(entropy - bits * 255).max() <= 1.5
        rows = list(csv.DictReader((tmp_path / "out/areas.csv").read_text().splitlines()))
        assert sum(int(row["pixels"]) for row in rows) == 90 * 70
        assert all(row["area_m2"] == "" and row["image"] == str(source) for row in rows)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_polygons_and_run_lengths_are_the_exact_mask(tmp_path):
    generator = np.random.default_rng(0)
    masks = [generator.integers(0, 3, (37, 41)).astype(np.uint8)]
    masks.append(generator.integers(0, 4, (7, 9)).repeat(6, 0).repeat(5, 1).astype(np.uint8))
    masks.append(np.zeros((5, 6), np.uint8))
    kinds = set()
    for mask in masks:
        found = np.full(mask.shape, 255, np.uint8)
        for region in regions(mask):
            kinds.add(type(region["segmentation"]))
            coded = coco_mask.frPyObjects(region["segmentation"], *mask.shape)
            own = coco_mask.decode(coded).reshape(mask.shape).astype(bool)
            assert region["area"] == own.sum()
            assert (found[own] == 255).all()
            found[own] = region["category_id"]
            ys, xs = np.nonzero(own)
            assert region["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        np.testing.assert_array_equal(found, mask)
    assert kinds == {list, dict}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_polygons_are_one_coco_file_of_all_images(checkpoint, tree, tmp_path):  # noqa: F811
    predict(config(checkpoint, tree, tmp_path / "out", recursive=True, save=["mask", "polygons"]))
    found = json.loads((tmp_path / "out/polygons.json").read_text())
    assert [entry["name"] for entry in found["categories"]] == CLASSES
    assert [Path(image["file_name"]).name for image in found["images"]] == [
        "a.png",
        "a.png",
        "b.jpg",
        "x.png",
    ]
    assert [entry["id"] for entry in found["annotations"]] == list(range(1, len(found["annotations"]) + 1))
    image = found["images"][2]
    mask, drawn = opened(tmp_path / "out/day/b.png")[0], np.full((40, image["width"]), 255)
    for entry in found["annotations"]:
        if entry["image_id"] == image["id"]:
            coded = coco_mask.frPyObjects(entry["segmentation"], *drawn.shape)
            drawn[coco_mask.decode(coded).reshape(drawn.shape) > 0] = entry["category_id"]
    np.testing.assert_array_equal(drawn, mask)


@pytest.mark.parametrize("most", [10**6, 1000])
def test_a_geotiff_keeps_its_reference(checkpoint, tmp_path, monkeypatch, most):  # noqa: F811
    monkeypatch.setattr(tiled, "MAX_PIXELS", most)
    image, transform = picture(120, 150), Affine(0.5, 0, 500_000, 0, -0.25, 4_600_000)
    layout = {"driver": "GTiff", "height": 120, "width": 150, "count": 3, "dtype": "uint8"}
    layout |= {"crs": "EPSG:32633", "transform": transform}
    (tmp_path / "in").mkdir()
    with rasterio.open(tmp_path / "in/field.tif", "w", **layout) as file:
        file.write(image.transpose(2, 0, 1))
    Image.fromarray(image).save(tmp_path / "in/plain.tif")
    save = ["mask", "areas"]
    predict(config(checkpoint, tmp_path / "in", tmp_path / "out", tile=64, save=save))
    with rasterio.open(tmp_path / "out/field.tif") as file:
        assert (file.crs.to_epsg(), file.transform) == (32633, transform)
        mask = file.read(1)
    ending = "png" if most > 1000 else "tif"
    np.testing.assert_array_equal(mask, opened(tmp_path / f"out/plain.{ending}")[0])
    rows = list(csv.DictReader((tmp_path / "out/areas.csv").read_text().splitlines()))
    for row in rows:
        area = int(row["pixels"]) * 0.5 * 0.25 if "field" in row["image"] else None
        assert row["area_m2"] == ("" if area is None else f"{area:.10g}")
    monkeypatch.setattr(geotiff, "there", lambda: False)
    assert geotiff.reference(tmp_path / "in/field.tif") is None


def test_work_is_done_ahead_in_order_and_grouped_by_size():
    from concurrent.futures import ThreadPoolExecutor

    taken = []

    def items():
        for index in range(9):
            taken.append(index)
            yield index

    with ThreadPoolExecutor(3) as pool:
        results = ahead(pool, lambda index: index * index, items(), 3)
        assert next(results) == 0
        assert taken == [0, 1, 2, 3]  # three ahead, no more
        assert list(results) == [index * index for index in range(1, 9)]
    shapes = [(1, 1), (2, 2), (1, 1), (3, 3), (4, 4), (5, 5), (2, 2)]
    groups = same_size(((index, np.zeros(shape)) for index, shape in enumerate(shapes)), 3)
    assert [[index for index, _ in group] for group in groups] == [[0, 2], [1, 6], [3], [4], [5]]
