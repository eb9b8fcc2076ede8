"""Composition against the schema: what ships composes, what is wrong is one clear line with exit code 2."""

import ast
import re
import runpy
import shlex
import sys
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from segformer.data.sources.content import override
from segformer.errors import ConfigError, SegformerError
from segformer.inference.convert import ConvertConfig
from segformer.inference.predict import PredictConfig
from segformer.training import config
from segformer.training.choices import CONF
from segformer.training.config import (
    FROZEN,
    SCHEDULE,
    RunConfig,
    cli,
    compose,
    frozen,
    frozen_difference,
    load_config,
    save_config,
)
from segformer.training.directory import free_name

ROOT = CONF.parent


def run_config(*overrides):
    return compose(RunConfig, "config", list(overrides))


def test_names_of_a_table_may_be_quoted():
    names = {"Baum (groß)": "tree", 'a "b": c, \\': "x y", "no": "ignore"}
    (word,) = shlex.split(override("data.category_map", names))
    assert run_config(word).data.category_map == names
    for wrong in (
        'data.category_map={"a": ${oc.env:HOME}}',
        'data.category_map={"a": [b]}',
        "data.x={'a': b}",
    ):
        with pytest.raises(ConfigError):
            run_config(wrong)
    with pytest.raises(ConfigError, match="can't be read"):
        run_config('data.category_map={"a": b')


def test_a_command_line_key_wins_over_the_experiment_and_that_over_the_recipe():
    assert run_config("recipe=official").optim.lr == 6e-5
    assert run_config("experiment=sample").optim.lr == pytest.approx(1e-3)
    assert run_config("experiment=sample", "optim.lr=0.5").optim.lr == 0.5
    assert run_config("experiment=sample", "model=b2").model.variant == "b2"


WRONG = {
    "stepz=3": "stepz is not a setting; did you mean steps?",
    "+foo=3": "foo is not a setting",
    "steps": "'steps' is not an override; write key=value",
    "steps=many": "steps=many must be a whole number",
    "steps=1e3": "steps=1e3 must be a whole number; write steps=1000",
    "optim.betas=[0.9,a]": "optim.betas=[0.9,a] must be a list of numbers, such as optim.betas=[0.9,0.999]",
    "optim.lr.x=2": "optim.lr.x is not a setting; optim.lr has one value",
    "name=null": "name can't be null",
    "data.shards=~/mine": "write data.shards=$HOME/mine",
    "data.classes=[leaf (young)]": "can't be read; write 'data.classes=[\"leaf (young)\"]'",
    "data.classes=[null,leaf]": "data.classes=[null,leaf] must be a list of texts",
    "augment.crop=512,512": "augment.crop=512,512 must be a list of whole numbers, such as augment.crop=[5",
    "engine.sync_batchnorm=maybe": "engine.sync_batchnorm=maybe must be true or false",
    "optim={lrr: 1}": "optim.lrr is not a setting; did you mean optim.lr?",
    "loader=9": "loader=9 is refused: loader is a group; it has workers, ",
    "loss.terms.dise=1": "loss.terms has unknown losses dise; use cross_entropy, ",
    "model.freeze=encoder": "model.freeze is not a setting; model has variant, ",
    "lr=1": "lr is not a setting; did you mean optim.lr?",
    "model=b9": "model=b9 does not exist; use one of b0, b1, b2, b3, b4, b5",
    "model.variant=b9": "model.variant=b9 is unknown; use one of b0, b1, b2, b3, b4, b5",
    "experiment=nope": "experiment=nope does not exist; use one of ",
    "steps=0": "steps=0 must be from 1 to 1000000000",
    "name=../x": "must be up to 64 letters",
    "name=${oc.env:HOME}": "resolvers are refused",
    "data.citation='${${data.name}.${data.license}:CANARY}'": "resolvers are refused",
    "hydra.searchpath=[file:///tmp]": "hydra's own settings are fixed",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_override_is_one_line_and_exit_code_2(override, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", override])
    with pytest.raises(SystemExit) as stop:
        cli(RunConfig, "config", lambda cfg: pytest.fail("it ran"))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("ConfigError: ")
    assert WRONG[override] in printed.err


def test_a_setting_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict.py"])
    with pytest.raises(SystemExit):
        cli(PredictConfig, "predict", print)
    assert capsys.readouterr().err == "ConfigError: checkpoint is missing; give checkpoint=...\n"


def test_the_old_name_of_a_key_is_accepted_with_a_line(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "argv", ["convert.py", "source=a", "out=b", "to=hf"])
    cli(ConvertConfig, "convert", seen.append)
    assert (seen[0].checkpoint, seen[0].output) == ("a", "b")
    assert capsys.readouterr().err.startswith("source= is now checkpoint=; ")


def test_other_ranks_leave_the_message_to_rank_zero(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "stepz=3"])
    with pytest.raises(SystemExit) as stop:
        cli(RunConfig, "config", print)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_the_argument_that_deepspeed_appends_is_ignored(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["train.py", "steps=7", "--local_rank=1", "--local-rank=1"])
    cli(RunConfig, "config", seen.append)
    assert seen[0].steps == 7


SCRIPTS = [*ROOT.glob("launch/*.py"), *ROOT.glob("data_prep/*.py")]
COMMANDS = [path for path in SCRIPTS if "cli(" in path.read_text()]


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.stem)
def test_help_explains_every_key_in_80_columns_and_mandatory_ones_first(script, monkeypatch, capsys):
    schemas, written = [], config.help_text

    def help_text(schema, *rest):
        schemas.append(schema)
        return written(schema, *rest)

    monkeypatch.setattr(config, "help_text", help_text)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    runpy.run_path(str(script), run_name="__main__")
    (text, _), (schema,) = capsys.readouterr(), schemas
    assert text.startswith(ast.get_docstring(ast.parse(script.read_text())))
    assert max(map(len, text.splitlines())) <= 80
    keys = re.findall(r"^  ([\w.]+)=.*?(?:   \(.*\))\n((?:      .*\n)*)", text, re.MULTILINE)
    leaves = [key for key, kind in settings(schema) if not is_dataclass(kind)]
    assert sorted(key for key, _ in keys) == sorted(leaves)
    assert [key for key, explained in keys if len(explained.split()) < 4] == []
    assert all("=...   (" in line for line in text.partition("\nKEYS")[0].splitlines() if "   (" in line)


def test_help_begins_with_the_keys_that_most_runs_set(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help", "optim.lr=0.25"])
    cli(RunConfig, "config", lambda cfg: pytest.fail("it ran"))
    first, _, _ = capsys.readouterr().out.partition("\nKEYS with")
    assert re.search(r"^  optim\.lr=0\.25 +Peak learning rate", first, re.MULTILINE)
    assert len(first.splitlines()) < 60, "two screens"


def settings(schema, prefix=""):
    for key, kind in get_type_hints(schema).items():
        yield f"{prefix}{key}", kind
        if is_dataclass(kind):
            yield from settings(kind, f"{prefix}{key}.")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_usage_of_a_script_has_an_example_and_80_columns(script):
    usage = ast.get_docstring(ast.parse(script.read_text()))
    assert f"python {script.relative_to(ROOT)} " in usage
    assert max(map(len, usage.splitlines())) <= 80


def test_help_shows_names_and_the_values_of_this_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help", "model=b3"])
    cli(RunConfig, "config", lambda cfg: pytest.fail("it ran"))
    text = capsys.readouterr().out
    assert "model.variant=b3   (text)\n      Size of the network" in text
    assert re.search(r"^  model +b0, b1, b2, b3, b4, b5, b6, b5_w2, b5_w4$", text, re.MULTILINE)
    assert re.search(r"^  data +ade20k, ", text, re.MULTILINE)


def test_a_mistake_in_a_file_names_file_and_key(tmp_path):
    (tmp_path / "conf/data").mkdir(parents=True)
    for line, wanted in (("clases: [a]", "data.clases"), ("classes: 3", "data.classes")):
        (tmp_path / "conf/data/mine.yaml").write_text(line)
        with pytest.raises(ConfigError) as caught:
            run_config(f"--conf={tmp_path}/conf", "data=mine")
        assert "\n" not in str(caught.value)
        assert "data/mine" in str(caught.value)
        assert wanted in str(caught.value)


def test_a_text_is_taken_as_it_stands():
    for text in ("s/lr=1e-3", "s/a#b", "s/run(2)", "a,b", "a'b", "a\\", " ", "[x", "${name}/x"):
        wanted = text.replace("${name}", "run")
        assert run_config(f"data.shards={text}").data.shards == wanted
    assert run_config("data.shards='a b'").data.shards == "a b"


def test_an_entry_of_a_dictionary_is_changed_or_added():
    cfg = run_config("loss.terms.dice=0.5", "loss.terms.cross_entropy=2")
    assert cfg.loss.terms == {"cross_entropy": 2.0, "dice": 0.5}
    assert run_config("loss.terms={dice: 0.5}", "~loss.terms.cross_entropy").loss.terms == {"dice": 0.5}
    assert run_config("data.label_map.7=1").data.label_map == {7: 1}
    assert run_config("data.label_map={7: 0, 9: 255}").data.label_map == {7: 0, 9: 255}


def test_a_saved_configuration_reads_back_equal(tmp_path):
    cfg = run_config("experiment=sample", "model=b1", "+loss.terms.dice=0.5")
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg


def test_the_name_that_is_proposed_for_another_run_is_one():
    long = run_config("experiment=sample", f"name={64 * 'a'}")
    assert run_config("experiment=sample", free_name(long)).name == 60 * "a" + "_2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", "can't be read.*; restore it from a copy$"),
        ("nonsense: 3", "can't be read as a configuration: Key 'nonsense'"),
        ("steps: many", "full_key: steps"),
        ("steps: 0", "config.yaml can't be read as a configuration: steps=0 must be from 1 to"),
        ("data:\n  citation: ${oc.env:HOME}", "resolvers are refused"),
        ("data:", "field 'data' is not Optional"),
        ("5", "it is no table of settings"),
        ("optim:\n  lr: .nan", "optim.lr=nan must be a number from"),
        ("optim:\n  lr: 1" + 400 * "0", "too large to convert"),
        ("a: &a [x]\nb: [*a, *a]", "it has aliases"),
        (2000 * "[", "maximum recursion depth"),
        ("data:\n  classes: [[a]]", "must be a list of texts"),
    ],
)
def test_a_damaged_configuration_is_refused(text, message, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SegformerError, match=message):
        load_config(tmp_path / "config.yaml")


def test_the_frozen_part_names_what_changed_and_lets_places_and_machines_change():
    before = run_config("experiment=sample")
    free = ("name=x", "micro_batch=2", "loader.workers=3", "engine.zero_stage=3", "data.shards=x")
    assert frozen_difference(before, run_config("experiment=sample", *free)) == []
    kept = ("steps=7", "model=b1", "optim.lr=0.1", "engine.grad_clip=1", "classification.size=48")
    assert frozen_difference(before, run_config("experiment=sample", *kept)) == [
        "classification.size: 224 -> 48",
        "engine.grad_clip: 0.0 -> 1.0",
        "model.variant: b0 -> b1",
        "optim.lr: 0.001 -> 0.1",
        "steps: 500 -> 7",
    ]
    assert {name.split(".")[0] for name in FROZEN} <= {field.name for field in fields(RunConfig)}


def test_the_micro_batch_shares_the_global_batch_out():
    cfg = run_config("global_batch=16")
    assert [cfg.batch_shape(ranks).micro_batch for ranks in (1, 2, 4, 16)] == [16, 8, 4, 1]


def test_folders_of_ones_own_stand_beside_conf_and_win(tmp_path, monkeypatch, capsys):
    for name, text in (
        ("data/mine.yaml", "name: mine\nclasses: [a, b]\n"),
        ("data/sample.yaml", "name: other\n"),
        ("experiment/night.yaml", "# @package _global_\ndefaults:\n  - override /data: mine\nsteps: 7\n"),
    ):
        (tmp_path / "my conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my conf" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    own = "--conf=my conf"
    cfg = run_config(own, "experiment=night", "model=b1")
    assert (cfg.data.name, cfg.data.classes, cfg.steps, cfg.model.variant) == ("mine", ["a", "b"], 7, "b1")
    assert run_config(own, "experiment=sample").data.name == "other"
    assert run_config("--conf", "my conf", "data=mine").data.name == "mine"
    assert run_config("experiment=sample").data.name == "sample"
    with pytest.raises(ConfigError, match=r"data=nine does not exist; use one of ade20k.*, mine, "):
        run_config(own, "data=nine")
    monkeypatch.setattr(sys, "argv", ["train.py", "--conf", "my conf", "--help"])
    cli(RunConfig, "config", lambda cfg: pytest.fail("it ran"))
    assert re.search(r"^  experiment .*\bnight\b", capsys.readouterr().out, re.MULTILINE | re.DOTALL)


def test_a_folder_that_would_replace_the_commands_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    with pytest.raises(ConfigError, match=r"config.yaml belongs to this system; .*experiment/config.yaml"):
        run_config(f"--conf={tmp_path}")
    for option in ("--conf=", "--conf=absent"):
        with pytest.raises(ConfigError, match=f"{option} is no folder"):
            run_config(option)


def test_the_table_of_what_may_change_on_a_run_is_that_of_the_schema():
    """docs/training.md names every setting once; the rows are FROZEN, SCHEDULE and the rest."""
    text = (ROOT / "docs/training.md").read_text()
    table = text.partition("| settings | once the run has a checkpoint |")[2].split("\n\n")[0]
    stay, schedule, free = (re.findall("`([^`]+)`", line.split("|")[1]) for line in table.splitlines()[2:])
    assert sorted(schedule) == sorted(SCHEDULE)
    assert sorted([*stay, "steps"]) == sorted(FROZEN)
    assert {key.partition(".")[0] for key in [*stay, *schedule, *free]} == {f.name for f in fields(RunConfig)}
    for row, others in ((free, [*stay, *schedule]), (stay, [*free, *schedule])):
        assert not set(row) & set(others)
    cfg = compose(RunConfig, "config", ["experiment=sample"])
    kept = frozen(cfg)
    assert not [key for key in free if "." in key and key.partition(".")[2] in kept[key.partition(".")[0]]]
    places = {key.partition(".")[2] for key in free if key.startswith("data.")}
    assert {f.name for f in fields(cfg.data)} - places == kept["data"].keys()
