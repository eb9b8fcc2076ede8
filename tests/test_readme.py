"""Every command and every example of the README runs, with fewer steps and in other folders."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SHORT = "steps=2 global_batch=2 augment.crop=[64,64] overlays=1 telemetry.log_every=1 loader.workers=0"


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands():
    lines = "\n".join(blocks("sh")).splitlines()
    return [
        line.split("  #")[0].strip() for line in lines if line.startswith(("python", "deepspeed", "torchrun"))
    ]


@pytest.mark.slow
def test_the_commands_run_in_the_order_they_are_written(root, tmp_path, tiny_root):
    found = commands()
    assert len(found) >= 8
    from segformer.distributed.rendezvous import free_port

    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

    trained = 0
    for command in found:
        if "launch/slurm.py" in command and "dry_run=true" not in command:
            continue  # it needs a cluster: tests/slurm
        text = command.replace("data_prep/sample/images/val", str(tiny_root / "images/val"))
        text = text.replace("root=data_prep/sample", f"root={tiny_root}").replace(
            "data/sample", f"{tmp_path}/shards"
        )
        text = text.replace("runs/sample", f"{tmp_path}/run-1").replace("exports/", f"{tmp_path}/exports-")
        text = text.replace("output=predictions", f"output={tmp_path}/predictions")
        if "launch/train.py" in text:
            trained += 1
            text += f" run_dir={tmp_path}/run-{trained} data.shards={tmp_path}/shards {SHORT}"
        text = text.replace("deepspeed ", f"deepspeed --master_port {free_port()} ")
        text = text.replace("torchrun ", f"torchrun --master-port {free_port()} ")
        program, *arguments = shlex.split(text)
        program = str(Path(sys.executable).parent / program)
        if program.endswith("deepspeed") and torch.cuda.device_count() == 1:
            continue  # it gives every rank a GPU of its own and hides none
        done = subprocess.run(
            [program, *arguments], cwd=root, env=on_cpu, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert trained == 3
    assert len(list((tmp_path / "predictions").glob("*_overlay.jpg"))) == 3


def anchors(text):
    """The names that GitHub gives the headings of a document."""
    return [
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]


def test_every_local_link_of_every_document_leads_somewhere(root):
    for document in [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("bench/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text()):
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), f"{document.name}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{document.name}: {link}"


def test_the_example_of_an_error_is_what_is_printed(root):
    (block,) = [text for text in blocks("") if text.startswith("$ python launch/train.py")]
    command, expected = block.strip().splitlines()
    arguments = shlex.split(command.removeprefix("$ python "))
    done = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (2, expected)


def test_the_python_example_runs():
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code, names)
    assert tuple(names["logits"].shape) == (1, 150, 128, 128)
