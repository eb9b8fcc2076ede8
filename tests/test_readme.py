"""Every command of every document is composed, and run or listed with the reason; so are examples in Python.

They run as they are printed, in a folder that has the commands and a tenth of the sample, also as `photos`;
only training is shortened.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import pytest
import shapes
import writers

from segformer.__main__ import commands as installed
from segformer.distributed.rendezvous import free_port
from segformer.errors import SegformerError
from segformer.inference.convert import ConvertConfig, convert
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.training.config import choices
from segformer.training.overrides import checked

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md")),
    ROOT / "data_prep/sample/README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("conf/**/*.yaml")),
]
SHORT = ("global_batch=2", "augment.crop=[64,64]", "overlays=1", "telemetry.log_every=1", "loader.workers=0")

NOT_RUN = {
    r": segformer ": "the script of that name, as it is: tests/test_package.py",
    r"launch/slurm\.py|srun ": "needs a cluster: tests/slurm",
    r"launch/serve\.py": "serves until it is stopped: tests/inference/serving",
    r"data_prep/download\.py": "downloads gigabytes: tests/data/sources/test_download.py",
    r"launch/sweep\.py|compare\.py runs[/=]": "needs many runs: tests/sweep, tests/inference/test_compare.py",
    r"launch/bench\.py": "measures for minutes: tests/bench",
    r"^docs/predict\.md": "stands for the reader's pictures: tests/inference/test_predict.py",
    r"^docs/results\.md": "measured, for minutes to hours",
    r"<|\[\.\.\.\]| \.\.\.$|s3://|mit_b2\.pth|=exports/(ade|start)\b": (
        "stands for the reader's files: tests/models/weights"
    ),
    r" (data|experiment)=(ade20k|cityscapes|coco|imagenet|camvid|roads)|runs/(ade20k|city|camvid|mit_b2)": (
        "needs that data set: tests/training/test_recipes.py"
    ),
    r"root=(mycoco|scenes|scans)\b": "stands for the reader's files: tests/data, test_multiband.py",
    r"runs/both|mixture\.": "needs two data sets: tests/training/test_mixture_run.py",
    r" 8 launch/": "needs eight devices; it runs with two",
    r"stepz": "is a mistake, on purpose: below",
}
"""What a command that isn't run lacks here, and where it is tested."""

INSTALLED = {name: str(path.relative_to(ROOT)) for name, path in installed().items()}
PROGRAM = (
    r"(?:(?:python|deepspeed|torchrun|srun)\b[^\n`]*? ?(?:launch|data_prep)/\w+\.py"
    rf"|(?<![\w.])segformer (?:{'|'.join(INSTALLED)})(?![\w.]))"
)
ARGUMENTS = r"""(?: (?![#(])(?:'[^']*'|"[^"]*"|<[^>]*>|[^\s;()'"<])+)*"""  # two spaces begin a note beside it


class Command(NamedTuple):
    """A command in a document."""

    document: str
    text: str
    script: str
    arguments: list[str]


def text_of(document: Path) -> str:
    """A document with continued lines and broken `code` on one line."""
    text = re.sub(r" *\\\n#? *", " ", document.read_text())
    return re.sub(r"(?<!`)`[^`]+`(?!`)", lambda code: " ".join(code[0].split()), text)


def commands(document: Path) -> Iterator[Command]:
    """The commands of a document; notes beside them are left out."""
    name = str(document.relative_to(ROOT))
    for found in re.finditer(rf"({PROGRAM})([^\n`]*)", text_of(document)):
        given = re.sub(r"(?<!\.\.)[.,]$", "", re.match(ARGUMENTS, found[2])[0])
        arguments = shlex.split(re.sub("<[^>]*>", "folder", given))
        arguments = [
            one.strip("[]") if one.startswith("[") else one for one in arguments if not one.endswith("...")
        ]
        text = f"{found[1]}{given}"
        script = found[1].split()[-1]
        script = INSTALLED.get(script, script)
        yield Command(name, text, script, arguments)


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a document in a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def reason_not_to_run(command: Command) -> str:
    """The reason in NOT_RUN; "" where the command is to run."""
    told = f"{command.document}: {command.text}"
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, told)), "")


def found_commands() -> list[Command]:
    """The commands of all documents, each once, the README's first."""
    unique: dict[str, Command] = {}
    for command in (command for document in DOCUMENTS for command in commands(document)):
        unique.setdefault(command.text, command)
    return list(unique.values())


@cache
def schema_of(script: str, trained: bool = False) -> tuple[type, str]:
    """The dataclass of a script, and its file of conf/; the doctor has one of trained models, too."""
    found = set(re.findall(r'cli\(\s*(\w+),\s*"(\w+)"', (ROOT / script).read_text()))
    if len(found) > 1:
        found = {one for one in found if (one[1] == "labels") == trained}
    ((name, config_name),) = found
    return runpy.run_path(str(ROOT / script))[name], config_name


def check_overrides(script: str, arguments: list[str]) -> None:
    """Refuse a key, a type or a name that the script doesn't have, and a key that it lacks."""
    schema, config_name = schema_of(script, any(one.startswith("checkpoint=") for one in arguments))
    names = choices(config_name)
    if "experiment" in names:
        names["experiment"] += ["roads", "night"]  # which docs/recipes.md and docs/python.md write
    given = [checked(schema, names, one).lstrip("+").partition("=")[0] for one in arguments if "=" in one]
    if all("=" in one for one in arguments):  # no --help, no path in the place of a key
        lacking = {field.name for field in fields(schema) if field.default == "???"} - set(given)
        assert not lacking, f"it needs {lacking}"


def check_command(command: Command) -> None:
    """The same of a command; those of a job and of a sweep take the keys of another script, too."""
    script, arguments = command.script, command.arguments
    if script == "launch/slurm.py" and arguments[:1] == ["sweep"]:
        job = {field.name for field in fields(schema_of(script)[0])}
        swept = [one for one in arguments[1:] if one.partition("=")[0] not in job]
        check_command(command._replace(script="launch/sweep.py", arguments=swept))
        arguments = [one for one in arguments if one not in swept]
    if script in ("launch/slurm.py", "launch/sweep.py"):
        own = {field.name for field in fields(schema_of(script)[0])} | {"cluster", "local", "tasks"}
        other = {"shard": "data_prep/shard.py", "evaluate": "launch/evaluate.py"}.get((arguments or [""])[0])
        rest = [one for one in arguments if "=" in one and re.split(r"[.=]", one)[0] not in own]
        arguments = [one for one in arguments if one not in rest and not one.startswith("tasks=")]
        lists = script == "launch/sweep.py"  # of values: each for itself
        rest = [re.sub(r"=(\w+\()?([^,[)]*?)(,|\.\.\d).*", r"=\2", one) if lists else one for one in rest]
        check_overrides(other or "launch/train.py", rest)
    if "stepz=" not in command.text:
        check_overrides(script, arguments)


def test_every_command_of_every_document_is_accepted():
    wrong = []
    for command in found_commands():
        try:
            check_command(command)
        except (SegformerError, AssertionError) as error:
            wrong.append(f"{command.document}: {command.text}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def user(tmp_path_factory, tiny_root):
    """The folder of a user: the commands, a tenth of the sample, photographs of one's own, saved weights."""
    folder = tmp_path_factory.mktemp("user")
    scripts = [f"data_prep/{path.name}" for path in ROOT.glob("data_prep/*.py")]
    for name in ("launch", "conf", "docs", *scripts):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    (folder / "data_prep/sample").symlink_to(tiny_root)
    shapes.write_folders(folder / "photos", {"train": 6, "val": 3})
    for kind in ("images", "masks"):
        (folder / "photos" / kind).symlink_to(tiny_root / kind)
    shutil.copy(next((tiny_root / "images/val").iterdir()), folder / "photo.jpg")
    items = [
        writers.Item(
            path.stem, cv2.imread(str(tiny_root / f"images/train/{path.stem}.jpg")), [("nucleus", ids > 0)]
        )
        for path in sorted((tiny_root / "masks/train").iterdir())
        if (ids := cv2.imread(str(path), cv2.IMREAD_UNCHANGED)).any()
    ]
    writers.labelme(folder / "export", {"": items})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        build_model(ModelConfig(variant="b2"), 150).save_pretrained("exports/ade_b2")
        file = "segformer.b2.512x512.ade.160k.pth"
        convert(ConvertConfig(checkpoint="exports/ade_b2", output=file, to="nvlabs"))
        yield folder


def run(command: Command, more: list[str], patch: pytest.MonkeyPatch) -> None:
    """Run a command in this process; a launcher and its ranks in processes of their own."""
    words = shlex.split(command.text)
    if words[0] == "python":
        patch.setattr(sys, "argv", [command.script, *command.arguments, *more])
        runpy.run_path(command.script, run_name="__main__")
        return
    port = {"deepspeed": "--master_port", "torchrun": "--master-port"}[words[0]]
    program = [str(Path(sys.executable).parent / words[0]), port, str(free_port())]
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    argv = [*program, *words[1:], *more]
    done = subprocess.run(argv, env=on_cpu, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command.document}: {command.text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_commands_run_as_they_are_printed_and_so_do_the_examples_in_python(user, monkeypatch):
    trained: list[str] = []
    for command in found_commands():
        more: list[str] = []
        if reason_not_to_run(command):
            continue
        if command.script == "launch/train.py" and "--help" not in command.arguments:
            steps = 14 if "profile.steps" in command.text else 2
            name = next((one for one in command.arguments if one.startswith(("name=", "experiment="))), "run")
            more = [f"steps={steps}", *SHORT, *([f"name=again_{len(trained)}"] if name in trained else [])]
            trained.append(name)
        run(command, more, monkeypatch)
    assert len(trained) >= 5
    assert len(list(Path("predictions").glob("*_overlay.jpg"))) == 3
    for document in DOCUMENTS:
        for code in blocks(document, "python"):
            exec(code, {})


def anchors(text):
    """The names that GitHub gives the headings of a document."""
    return [
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]


def test_every_local_link_of_every_document_leads_somewhere():
    for document in (path for path in DOCUMENTS if path.suffix == ".md"):
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text()):
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), f"{document.name}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{document.name}: {link}"


def test_every_target_of_make_that_is_named_is_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for document in DOCUMENTS:
        for line in re.findall(r"(?:^|`)make ((?:[\w-]+ ?)+)", document.read_text(), re.MULTILINE):
            assert set(line.split()) <= set(targets), f"{document.name}: make {line}"


def test_the_example_of_an_error_is_what_is_printed(monkeypatch, capsys):
    (block,) = [text for text in blocks(ROOT / "README.md", "") if text.startswith("$ python launch/")]
    command, expected = block.strip().splitlines()
    monkeypatch.setattr(sys, "argv", shlex.split(command.removeprefix("$ python ")))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    assert (stop.value.code, capsys.readouterr().err.strip()) == (2, expected)
