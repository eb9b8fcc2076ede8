"""Plans of sweeps: grids, draws, names and rungs, held against closed forms and plain loops."""

import math

import pytest

from segformer.errors import ConfigError
from segformer.sweep.plan import Rung, SearchConfig, best, keep_plan, rungs, trials


def varied(overrides, **settings):
    """The overrides of every run, and their names."""
    planned = trials(overrides, SearchConfig(**settings))
    return [trial.overrides for trial in planned], [trial.name for trial in planned]


def test_a_grid_has_every_combination_and_names_say_which():
    overrides, names = varied(["experiment=sample", "optim.lr=1e-4,3e-4", "model=b0,b1", "seed=0,1,2"])
    expected = [
        ["experiment=sample", f"model={model}", f"optim.lr={lr}", f"seed={seed}"]
        for model in ("b0", "b1")
        for lr in ("1e-4", "3e-4")
        for seed in (0, 1, 2)
    ]
    assert overrides == expected
    assert names[0] == "model-b0_lr1e-4_seed0"
    assert names == varied(["seed=0,1,2", "experiment=sample", "model=b0,b1", "optim.lr=1e-4,3e-4"])[1]
    assert len(set(names)) == 12
    settings = {trial.setting for trial in trials(["optim.lr=1e-4,3e-4", "seed=0,1"], SearchConfig())}
    assert settings == {"optim.lr=1e-4", "optim.lr=3e-4"}, "a seed is no setting"
    for sign in ("+", "++"):
        assert trials([f"{sign}seed=0,1", "steps=5"], SearchConfig()) == trials(
            ["seed=0,1", "steps=5"], SearchConfig()
        )


def test_a_list_in_brackets_and_a_text_in_quotes_are_one_value():
    overrides, names = varied(['data.citation="a, b"', "augment.crop=[64,64],[96,96]", "augment.scale=[1,2]"])
    assert [one[2] for one in overrides] == ["augment.crop=[64,64]", "augment.crop=[96,96]"]
    assert names == ["crop-_64_64", "crop-_96_96"]


def test_names_that_would_be_long_or_the_same_are_numbers():
    assert varied(["a.b=x y,x-y", "c=1"])[1] == ["b-x_y", "b-x-y"]
    assert varied(["a=x+,x-"])[1] == ["run000", "run001"]
    assert varied([f"key={'v' * 70},1"])[1] == ["run000", "run001"]
    assert varied(["a=b,B"])[1] == ["run000", "run001"]
    assert varied(["a.lr=1,2", "b.lr=1,2"])[1][0] == "a.lr1_b.lr1"


def test_draws_lie_in_their_ranges_and_each_meets_every_seed():
    given = ["optim.lr=log(1e-5,1e-1)", "model.dropout=0.0..0.3", "steps=10..12", "model=b0,b1", "seed=4,5"]
    planned = trials(given, SearchConfig(random=200))
    assert planned == trials(given, SearchConfig(random=200)), "the same draws every time"
    assert planned != trials(given, SearchConfig(random=200, seed=1))
    values = [dict(one.split("=") for one in trial.overrides) for trial in planned]
    assert [value["seed"] for value in values] == ["4", "5"] * 200
    rates = sorted(float(value["optim.lr"]) for value in values)
    assert 1e-5 <= rates[0] < rates[-1] <= 1e-1
    assert math.log10(rates[200]) == pytest.approx(-3, abs=0.5), "half of them lie below the geometric mean"
    assert all(0 <= float(value["model.dropout"]) <= 0.3 for value in values)
    assert {value["steps"] for value in values} == {"10", "11", "12"}
    assert {value["model"] for value in values} == {"b0", "b1"}


@pytest.mark.parametrize("text", ["log(1E-5, 1e-1)", " Log( .00001 ,.1)", ".00001 .. .1", "1E-5..1e-1"])
def test_ranges_are_read_as_people_write_numbers(text):
    found = trials([f"optim.lr={text}"], SearchConfig(random=20))
    assert all(1e-5 <= float(one.overrides[0].partition("=")[2]) <= 0.1 for one in found)


@pytest.mark.parametrize(
    ("overrides", "settings", "words"),
    [
        (["steps=5"], {}, "nothing varies"),
        (["optim.lr=log(1e-5,1e-3)"], {}, r"is a range; add sweep.random=20"),
        (["optim.lr=1e-3,0.001"], {}, "the same one twice"),
        (["optim.lr=log(1e-5;1e-3)"], {"random": 2}, r"optim.lr=log\(1e-5;1e-3\) is no range"),
        (["optim.lr=0.1..x"], {"random": 2}, "is no range"),
        (["optim.lr=1e-3,"], {}, "an empty value"),
        (["optim.lr=log(0,1)"], {"random": 2}, "the first above 0"),
        (["optim.lr=3..2"], {"random": 2}, "the first below the second"),
        (["optim.lr=1,2", "optim.lr=3,4"], {}, "is given twice"),
        (["optim.lr=3", "optim.lr=3,4"], {}, "is given twice"),
        (["optim.lr=1,2", "steps=1,2"], {"random": 5}, "only 4 settings"),
        ([f"seed={','.join(map(str, range(1001)))}"], {}, "1001 runs, the limit is 1000"),
    ],
)
def test_what_is_no_plan_is_refused_in_words(overrides, settings, words):
    with pytest.raises(ConfigError, match=words):
        trials(overrides, SearchConfig(**settings))


def test_rungs_leave_one_in_so_many_and_end_with_the_whole_run():
    assert rungs(7, 0) == [Rung(1.0, 7)]
    assert rungs(9, 3) == [Rung(pytest.approx(1 / 9), 9), Rung(pytest.approx(1 / 3), 3), Rung(1.0, 1)]
    assert rungs(20, 3) == [Rung(pytest.approx(1 / 9), 20), Rung(pytest.approx(1 / 3), 6), Rung(1.0, 2)]
    for factor in (2, 3, 5):
        for settings in range(factor, 200):
            stages = rungs(settings, factor)
            assert stages[-1].share == 1
            assert 1 <= stages[-1].settings < factor, "one more rung would leave none"
            assert [one.settings for one in stages] == [settings // factor**k for k in range(len(stages))]
    with pytest.raises(ConfigError, match="needs 3 settings or more, there are 2"):
        rungs(2, 3)
    with pytest.raises(ConfigError, match="must be 2 or more"):
        SearchConfig(halving=1)


def test_the_best_are_those_of_a_sorted_list_and_without_a_score_nobody_is():
    scores = {"a": 0.3, "b": None, "c": 0.5, "d": math.nan, "e": 0.5}
    assert best(scores, 2) == ["c", "e"], "of equal ones the first comes first"
    assert best(scores, 5) == ["c", "e", "a"]


def test_another_plan_under_the_same_name_is_refused_with_the_difference(tmp_path):
    given, cfg = ["experiment=sample", "optim.lr=1e-4,3e-4"], SearchConfig(jobs=1)
    planned = trials(given, cfg)
    keep_plan(tmp_path, given, cfg, planned, [9, 9])
    before = (tmp_path / "sweep.json").read_bytes()
    assert keep_plan(tmp_path, given, SearchConfig(jobs=3), planned, [5, 5]) == [9, 9]
    with pytest.raises(ConfigError, match=r"has optim.lr=1e-4,3e-4, .* has optim.lr=1,2; give"):
        keep_plan(tmp_path, ["experiment=sample", "optim.lr=1,2"], cfg, planned, [9, 9])
    with pytest.raises(ConfigError, match=r"this command has sweep.halving=2"):
        keep_plan(tmp_path, given, SearchConfig(halving=2), planned, [9, 9])
    assert (tmp_path / "sweep.json").read_bytes() == before
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match=r"sweep.json can't be read"):
        keep_plan(tmp_path, given, cfg, planned, [9, 9])
