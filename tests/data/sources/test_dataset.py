import pytest

from segformer.data.sources.dataset import DatasetConfig, class_palette
from segformer.errors import ConfigError


def test_generated_colours_are_those_of_pascal_voc() -> None:
    palette = class_palette(DatasetConfig(classes=[str(index) for index in range(22)]))
    known = {0: [0, 0, 0], 1: [128, 0, 0], 2: [0, 128, 0], 15: [192, 128, 128], 20: [0, 64, 128]}
    assert {index: palette[index].tolist() for index in known} == known


def test_few_classes_have_bright_colours_on_black() -> None:
    palette = class_palette(DatasetConfig(classes=list("abcdefgh")))
    assert palette[:2].tolist() == [[0, 0, 0], [230, 159, 0]]
    assert (palette[1:].max(1) >= 158).all()
    assert len({tuple(color) for color in palette.tolist()}) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_suffix": ".gif"}, "data.image_suffix='.gif'"),
        ({"mask_suffix": ".jpg"}, "data.mask_suffix='.jpg'"),
        ({"channels": 33}, "data.channels=33; use 1 to 32"),
        ({"dtype": "int16"}, "data.dtype='int16' is unknown; use uint8, uint16, float32"),
        ({"dtype": "uint16", "image_range": [0, 9]}, "makes 8 bits of 16"),
        ({"splits": ["../train"]}, "data.splits"),
        ({"classes": ["a", "b", "a"]}, "names a twice"),
        ({"classes": [str(index) for index in range(256)]}, "256 names"),
        ({"classes": ["a"], "palette": [[0, 0, 0], [1, 1, 1]]}, "2 colors for 1 classes"),
        ({"classes": ["a"], "palette": [[0, 0, 256]]}, "0 to 255"),
        ({"classes": ["a"], "label_map": {3: 1}}, "maps 3 to 1"),
        ({"classes": ["a"], "label_map": {70000: 0}}, "70000"),
        ({"task": "detection"}, "use segmentation or classification"),
        ({"split_dirs": {"a b": "x"}}, "data.split_dirs names 'a b'"),
        ({"mask_colours": [[0, 0]]}, r"data.mask_colours holds \[0, 0\]"),
        ({"mask_colours": [[0, 0, 1], [0, 0, 1]]}, r"\[0, 0, 1\] twice"),
        ({"min_share": 0.5}, "needs data.drop_classes"),
        ({"classes": ["a"], "min_share": 1.0, "drop_classes": ["a"]}, "data.min_share=1.0"),
        ({"classes": ["a"], "drop_classes": ["a", "b"]}, "data.drop_classes names b,"),
        ({"class_dirs": ["a"]}, "data.class_dirs means nothing where data.task=segmentation"),
        ({"task": "classification", "label_map": {0: 255}}, "data.label_map means nothing"),
        ({"task": "classification", "class_dirs": ["a/b"]}, "the name of a folder"),
        ({"task": "classification", "classes": ["x"], "class_dirs": ["a", "b"]}, "1 names for 2 folders"),
        ({"task": "classification", "class_dirs": ["a", "a"]}, "data.class_dirs names a twice"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DatasetConfig(**settings)


def test_a_folder_is_that_of_the_split_or_what_split_dirs_gives() -> None:
    cfg = DatasetConfig(split_dirs={"val": "validation"}, mask_dir="masks")
    assert [cfg.folder("image", split) for split in ("train", "val")] == ["images/train", "images/validation"]
    assert cfg.folder("mask", "val") == "masks"
