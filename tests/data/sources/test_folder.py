from segformer.data.sources.folder import left_out, left_out_text


def test_what_is_left_out_is_counted_by_kind_with_an_example() -> None:
    names = [
        "b.TIF",
        "a.tif",
        "a.webp",
        "._a.jpg",
        "x/.git/b.png",
        "x/Thumbs.db",
        "README",
        "scan.0001",
        "x/",
    ]
    found = left_out(names)
    assert found == {
        "hidden": (3, "._a.jpg"),
        "other": (2, "README"),
        ".tif": (2, "a.tif"),
        ".webp": (1, "a.webp"),
        "sub-folder": (1, "x/"),
    }
    assert sum(count for count, _ in found.values()) == len(names)
    assert left_out_text(found).startswith("3 x hidden (._a.jpg, ...), 2 x other (README, ...), 2 x .tif")
    assert left_out_text({}) == ""


def test_a_name_is_shown_and_does_nothing() -> None:
    assert "\x1b" not in left_out_text(left_out(["\x1b[2J.tif", "a.\x1b[2J"]))
