"""The house rules as checks: import order, owners of packages, sizes, banned calls, clean files, configs.

Each check is a function (text of a file -> list of complaints). It runs over the repository, and over a
planted violation, so that a check that can't fail is itself a failure.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from segformer.training.config import RunConfig, compose

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_ENTRIES = 15

# Rooms, and the modules of each; a module imports only what stands before it, here and in its row.
ROOMS: dict[str, str] = {
    "errors": "",
    "files": "",
    "data.sources": (
        "web dataset content decode tiff png picture division similar folder masks shapes sample large"
    ),
    "data.formats": (
        "base coco coco_panoptic outlines yolo labelme cvat label_studio supervisely "
        "voc binary_masks csv_pairs huggingface table"
    ),
    "data.sources.": "listing download",
    "data.shards": (
        "pool storage index tiling format reader verify workfolder moments trimming cutting packing joining "
        "sharding"
    ),
    "data.loading": "order photometric crop classification mixing samples mixture workers loader",
    "distributed": "rendezvous world engine zero_state ema watchdog",
    "checkpoint": "atomic lease format reader checkpointer",
    "models": "variants backbone",
    "models.ops": (
        "native dispatch linear depthwise block resize batch_norm decode cross_entropy argmax trial "
        "backend bilinear_triton depthwise_triton resize_triton sweep_triton "
        "cross_entropy_triton argmax_triton"
    ),
    "models.": "layers mit encoders head",
    "models.weights": "key_maps bundle class_map stem tensor_files read write load",
    "models..": "segformer macs",
    "telemetry": "jsonl meter confusion trackers machine progress logger profiling",
    "evaluation": (
        "tables metrics bootstrap boundary inference_mode stitching drawing calibration measures findings "
        "evaluate"
    ),
    "training": (
        "losses partial_labels optim early_stop overrides choices help config sizing task directory "
        "stopping step header run recovery loop"
    ),
    "inference": "page",
    "inference.exports": "graph runtime gate int8 write",
    "inference.": "export convert evaluated score photograph predictor",
    "inference.predicting": "inputs pipeline geotiff outputs tiles tiled",
    "inference.serving": "batching door app serve",
    "inference..": "predict pictures provenance report compared compare",
    "job": "",
    "api": "",
    "sweep": "plan runs queue",
    "slurm": "attempts settings queue code script after task submission commands sweeping",
    "doctor": "memory measure scan judge advice report doctor labels",
}
ORDER = [
    f"{room.rstrip('.')}.{module}" if module else room
    for room, modules in ROOMS.items()
    for module in (modules.split() or [""])
]

# Third-party package -> the modules that may import it. torch and numpy belong to everybody.
DATA = {module for module in ORDER if module.startswith("data.")}
OWNERS: dict[str, set[str]] = {
    "torch.distributed": {"distributed.world", "distributed.rendezvous"},
    "deepspeed": {"distributed.engine", "distributed.zero_state"},
    "wandb": {"telemetry.trackers"},
    "torch.utils.tensorboard": {"telemetry.trackers"},
    "pynvml": {"telemetry.meter"},
    "tqdm": {
        "telemetry.progress",
        "data.shards.pool",
        "data.sources.download",
        "data.sources.masks",
        "doctor.scan",
    },
    "torchmetrics": {"evaluation.metrics"},
    "webdataset": {"data.shards.packing"},
    "hydra": {"training.config"},
    "omegaconf": {"training.choices", "training.config"},
    "yaml": {"files", "training.config"},
    "safetensors": {"checkpoint.format", "models.weights.tensor_files", "models.weights.write"},
    "cv2": DATA
    | {
        "evaluation.boundary",
        "evaluation.drawing",
        "inference.exports.gate",
        "inference.predicting.outputs",
        "inference.predicting.tiled",
        "api",
        "doctor.labels",
    },
    "onnx": {"inference.exports.graph", "inference.exports.runtime", "inference.exports.int8"},
    "onnxruntime": {"inference.exports.int8", "inference.exports.runtime"},
    "openvino": {"inference.exports.runtime", "inference.exports.write"},
    "PIL": {
        "data.sources.decode",
        "data.sources.large",
        "data.sources.picture",
        "evaluation.drawing",
        "inference.photograph",
        "inference.predictor",
        "inference.predicting.outputs",
        "inference.predicting.tiled",
        "inference.pictures",
        "inference.serving.app",
        "telemetry.confusion",
    },
    "fastapi": {"inference.serving.app", "inference.serving.serve"},
    "starlette": {"inference.serving.app", "inference.serving.door"},
    "uvicorn": {"inference.serving.serve"},
    "python_multipart": {"inference.serving.serve"},
    "datasets": {"data.formats.huggingface"},
    "huggingface_hub": {"data.formats.huggingface"},
    "pyarrow": {"data.formats.huggingface"},
    "tifffile": {"data.sources.tiff"},
    "rasterio": {"inference.predicting.geotiff"},
    "imagecodecs": {"data.sources.tiff"},
    "fsspec": {"data.shards.storage"},
    "aiohttp": {"data.shards.storage"},
    "matplotlib": {"evaluation.calibration", "inference.pictures", "inference.compare"},
    "triton": {module for module in ORDER if module.endswith("_triton")},
    "torch": set(ORDER),
    "numpy": set(ORDER),
}
# Slow to import, or not there at prediction time: imported inside the function that needs them.
HEAVY = (
    *("deepspeed", "hydra", "omegaconf", "wandb", "matplotlib", "PIL", "fsspec", "aiohttp", "pynvml"),
    *("datasets", "pyarrow", "huggingface_hub", "tifffile", "imagecodecs", "rasterio"),
    *("fastapi", "starlette", "uvicorn", "python_multipart"),
)
SCRIPTS = ("launch/*.py", "data_prep/*.py", "segformer/__main__.py", "segformer/**/__init__.py")
KERNELS = "_triton"  # end of the names of modules that need Triton, which a machine without a GPU lacks

BANNED_IMPORTS = ("pickle", "cloudpickle", "dill", "marshal", "shelve")
BANNED_CALLS = re.compile(
    r"torch\.(serialization\.)?load|torch\.serialization\.(add_)?safe_globals"
    r"|yaml\.(unsafe_|full_)?load|os\.(system|popen)|eval|exec|(.*\.)?instantiate"
)
# The one place that reads .pth files; each of its calls must say weights_only=True, literally.
SAFE_LOAD = "models.weights.tensor_files"
BANNED_NAMES = ("utils", "helpers", "common", "misc")


class Import(NamedTuple):
    """One imported dotted name; `where` is top, function or typing (below `if TYPE_CHECKING`)."""

    name: str
    line: int
    where: str


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return ""


def imports(node: ast.AST, where: str = "top") -> Iterator[Import]:
    """Every import below `node`; a relative one begins with its dots."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, where) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            yield from (Import(f"{base}.{alias.name}", child.lineno, where) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, "function")
        elif isinstance(child, ast.If) and dotted(child.test).endswith("TYPE_CHECKING"):
            yield from imports(child, "typing")
        else:
            yield from imports(child, where)


tree = functools.cache(ast.parse)


@functools.cache
def imports_of(text: str) -> list[Import]:
    return list(imports(tree(text)))


def internal(name: str) -> str | None:
    """The module of ORDER that the dotted `name` is in; "" for a bare package; None outside segformer."""
    if name.split(".")[0] not in ("segformer", ""):
        return None
    inner = name.removeprefix("segformer").removeprefix(".")
    owners = [m for m in ORDER if inner == m or inner.startswith(m + ".")]
    return max(owners, key=len) if owners else ""


def check_order(module: str, text: str) -> list[str]:
    if module not in ORDER:
        return [f"{module}: not in the import order; give it a place in tests/test_architecture.py"]
    found = []
    for imported in imports_of(text):
        target = internal(imported.name)
        if target is None:
            continue
        at = f"{module}:{imported.line}: imports {imported.name}"
        if imported.name.startswith("."):
            found.append(f"{at}; name it from segformer on")
        elif target == "":
            found.append(f"{at}, a package; name the module")
        elif ORDER.index(target) >= ORDER.index(module):
            found.append(f"{at}, which is not left of it in the import order")
        elif {module.split(".")[0], target.split(".")[0]} == {"data", "models"}:
            found.append(f"{at}, but data and models don't know each other")
    return found


def check_owners(module: str, text: str) -> list[str]:
    names = [(i.name, i.line) for i in imports_of(text)]
    # `import torch` also opens torch.distributed as an attribute.
    names += [(dotted(n), n.lineno) for n in ast.walk(tree(text)) if isinstance(n, ast.Attribute)]
    found = set()
    for name, line in names:
        owned = [p for p in OWNERS if name == p or name.startswith(p + ".")]
        if owned and module not in OWNERS[max(owned, key=len)]:
            found.add(f"{module}:{line}: {max(owned, key=len)} belongs to other modules")
    for imported in imports_of(text):
        top = imported.name.split(".")[0]
        if top not in sys.stdlib_module_names and top != "segformer" and top not in OWNERS:
            found.add(f"{module}:{imported.line}: {top} has no owner; give it one in this file")
    return sorted(found)


def check_places(module: str, text: str) -> list[str]:
    found = []
    for imported in imports_of(text):
        top = imported.name.split(".")[0]
        at = f"{module}:{imported.line}: {imported.name}"
        if top in HEAVY and imported.where == "top":
            found.append(f"{at} is heavy; import it inside the function that needs it")
        if KERNELS in imported.name and not module.endswith(KERNELS):
            found.append(f"{at} needs Triton; name it to `register`, which imports it on a GPU")
        elif imported.where == "function" and (top in sys.stdlib_module_names or top == "segformer"):
            found.append(f"{at} belongs to the top of the file")
    return found


def check_sizes(module: str, text: str) -> list[str]:
    lines = len(text.splitlines())
    found = [f"{module}: {lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(tree(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > MAX_FUNCTION_LINES:
                found.append(f"{module}:{node.lineno}: {size} lines, at most {MAX_FUNCTION_LINES}")
    return found


def check_documented(module: str, text: str) -> list[str]:
    name = module.split(".")[-1]
    found = [f"{module}: {name} says nothing about what it owns"] if name in BANNED_NAMES else []
    return found if ast.get_docstring(tree(text)) else [*found, f"{module}: no docstring"]


def check_banned(module: str, text: str) -> list[str]:
    """Code that runs what a file says: pickles, shells, unsafe YAML, webdataset's decoders, instantiate."""
    found = [
        f"{module}:{i.line}: {i.name} runs code of the file it reads"
        for i in imports_of(text)
        if i.name.split(".")[0] in BANNED_IMPORTS
        or BANNED_CALLS.fullmatch(i.name)
        or i.name == "webdataset.autodecode"
    ]
    pipelines = any(i.name.split(".")[0] == "webdataset" for i in imports_of(text))
    for node in ast.walk(tree(text)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        options = [ast.unparse(keyword) for keyword in node.keywords]
        if module == SAFE_LOAD and name == "torch.load" and "weights_only=True" in options:
            continue
        if BANNED_CALLS.fullmatch(name):
            found.append(f"{module}:{node.lineno}: {name}() is banned")
        method, arguments = getattr(node.func, "attr", ""), [ast.unparse(value) for value in node.args]
        if pipelines and method in ("decode", "xdecode") and arguments[:1] != ["'utf-8'"]:
            found.append(f"{module}:{node.lineno}: .decode() without an encoding: webdataset's runs pickles")
        for option in options:
            if option.startswith(("shell=", "allow_pickle=")) and not option.endswith("=False"):
                found.append(f"{module}:{node.lineno}: {option} is banned")
    return found


MACHINE = re.compile(
    r"(?<![\w.\-])/(?:root|home|Users|work)/\w"  # somebody's folder
    r"|https?://(?:10\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)"  # a private address
    r"|https?://(?!localhost\b)[A-Za-z0-9-]+[:/]"  # a host without a domain: a registry of this network
    r"|(?:index-url|INDEX_URL|find-links)[ =]+(?!https://(?:pypi\.org|download\.pytorch\.org)/)\S+"
)


def check_clean(name: str, text: str) -> list[str]:
    return [
        f"{name}:{number}: {match.group()!r} names a machine"
        for number, line in enumerate(text.splitlines(), 1)
        for match in MACHINE.finditer(line)
    ]


def module_files() -> dict[str, str]:
    """Dotted module name -> text, for the modules of segformer/ (packages without code are left out)."""
    found = {}
    library = ROOT / "segformer"
    for path in sorted(library.rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            found[".".join(path.relative_to(library).with_suffix("").parts)] = path.read_text("utf-8")
    return found


def script_files() -> dict[str, str]:
    paths = [path for kind in SCRIPTS for path in ROOT.glob(kind)]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def text_files() -> dict[str, str]:
    """Every file that git tracks or would track, as text; pictures and archives are left out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = {}
    for name in filter(None, listed.stdout.decode("utf-8").split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b"\0"
        if b"\0" not in data[:8192]:
            found[name] = data.decode("utf-8", errors="replace")
    return found


Check = Callable[[str, str], list[str]]
PLANTED: list[tuple[Check, str, str]] = [
    (check_order, "training.losses", "import segformer.training.optim"),
    (check_order, "training.losses", "from segformer.training import loop"),
    (check_order, "training.losses", "def f():\n    from segformer.training.losses import x"),
    (check_order, "data.loading.order", "from .loader import x"),
    (check_order, "training.losses", "from segformer.models import SegFormer"),
    (check_order, "models.mit", "from segformer.data.loading.order import SampleOrder"),
    (check_order, "newcomer", ""),
    (check_owners, "training.losses", "def f():\n    import deepspeed.comm"),
    (check_owners, "training.optim", "import torch\nrank = torch.distributed.get_rank()"),
    (check_owners, "training.optim", "from torch import distributed"),
    (check_owners, "training.optim", "import torch.distributed as d"),
    (check_owners, "training.optim", "import scipy"),
    (check_places, "distributed.engine", "import deepspeed"),
    (check_places, "inference.report", "from PIL import Image"),
    (check_places, "training.losses", "def f():\n    import math"),
    (check_places, "training.losses", "def f():\n    from segformer.errors import ConfigError"),
    (check_owners, "training.loop", "from launch.train import main"),
    (check_owners, "training.loop", "import data_prep.shard"),
    (check_sizes, "training.losses", "\n" * (MAX_FILE_LINES + 1)),
    (check_sizes, "training.losses", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (check_places, "models.ops.depthwise", "from segformer.models.ops import depthwise_triton"),
    (check_documented, "training.losses", "x = 1"),
    (check_documented, "data.utils", '"""Documented."""'),
    (check_banned, "checkpoint.checkpointer", "import torch\ntorch.load('x')"),
    (check_banned, "checkpoint.checkpointer", "import torch\ntorch.load('x', weights_only=True)"),
    (check_banned, SAFE_LOAD, "import torch\ntorch.load('x')"),
    (check_banned, SAFE_LOAD, "import torch\ntorch.load('x', weights_only=False)"),
    (check_banned, SAFE_LOAD, "import torch\ntorch.load('x', weights_only=wanted)"),
    (check_banned, SAFE_LOAD, "import torch\ntorch.serialization.add_safe_globals([X])"),
    (check_banned, "checkpoint.checkpointer", "from torch import load"),
    (check_banned, "checkpoint.checkpointer", "import pickle"),
    (check_banned, "training.config", "import yaml\nyaml.load(f)"),
    (check_banned, "training.config", "from hydra.utils import instantiate"),
    (check_banned, "training.loop", "import os\nos.system('ls')"),
    (check_banned, "training.loop", "import subprocess\nsubprocess.run('ls', shell=True)"),
    (check_banned, "training.loop", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    (check_banned, "training.loop", "eval('1')"),
    (check_banned, "data.loading.loader", "import webdataset\npipeline.decode()"),
    (check_banned, "data.loading.loader", "import webdataset\npipeline.decode('pil')"),
    (check_banned, "data.loading.loader", "from webdataset import autodecode"),
    (check_clean, "Makefile", "cd /" + "home/ada/x"),
    (check_clean, "Makefile", "pip install --index-url" + " https://example.org/simple"),
    (check_clean, "Makefile", "http://" + "10.1.2.3/simple"),
    (check_clean, "Makefile", "http://" + "mirror:8080/simple"),
]
INNOCENT: list[tuple[Check, str, str]] = [
    (check_order, "training.losses", "from segformer.errors import ConfigError\nimport math"),
    (check_owners, "distributed.world", "import torch.distributed as d"),
    (check_places, "distributed.engine", "def f():\n    import deepspeed"),
    (check_places, "distributed.engine", "if TYPE_CHECKING:\n    import deepspeed"),
    (check_banned, SAFE_LOAD, "import torch\ntorch.load('x', weights_only=True)"),
    (check_banned, "data.loading.loader", "header.decode('utf-8')\nmodel.eval()\nrun(['ls'], shell=False)"),
    (check_clean, "README.md", "runs/sample https://pypi.org/x localhost http://localhost:80 net/work/x"),
]


@pytest.mark.parametrize(("check", "name", "text"), PLANTED, ids=lambda v: getattr(v, "__name__", None))
def test_a_planted_violation_is_found(check: Check, name: str, text: str) -> None:
    assert check(name, text)


@pytest.mark.parametrize(("check", "name", "text"), INNOCENT, ids=lambda v: getattr(v, "__name__", None))
def test_what_is_allowed_passes(check: Check, name: str, text: str) -> None:
    assert check(name, text) == []


RULES = (check_sizes, check_documented, check_banned)


@pytest.mark.parametrize("check", [check_order, check_owners, check_places, *RULES])
def test_the_library_keeps_the_rule(check: Check) -> None:
    complaints = [c for name, text in module_files().items() for c in check(name, text)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("check", RULES)
def test_the_scripts_keep_the_rule(check: Check) -> None:
    complaints = [c for name, text in script_files().items() for c in check(name, text)]
    assert not complaints, "\n".join(complaints)


def test_no_file_names_a_machine() -> None:
    complaints = [c for name, text in text_files().items() for c in check_clean(name, text)]
    assert not complaints, "\n".join(complaints)


def picture(files: dict[str, str]) -> str:
    """Rooms as rows and columns, a dot where the room of the row imports that of the column."""
    rooms = list(dict.fromkeys(room.split(".")[0] for room in ROOMS))
    wide = max(map(len, rooms))
    uses = {room: set() for room in rooms}
    for module, text in files.items():
        found = [internal(i.name) for i in imports_of(text)]
        uses[module.split(".")[0]] |= {name.split(".")[0] for name in found if name}
    head = [" " * wide + "".join(f" {room[0]}" for room in rooms)]
    rows = [
        f"{room:{wide}}"
        + "".join(" \\" if room == other else " \u25cf" if other in uses[room] else "  " for other in rooms)
        for room in rooms
    ]
    return "\n".join(line.rstrip() for line in head + rows)


def test_the_picture_of_the_rooms_is_true() -> None:
    drawn = (ROOT / "docs/architecture.md").read_text("utf-8").split("```")[1].strip("\n")
    assert drawn == picture(module_files()), f"docs/architecture.md should have\n{picture(module_files())}"


def test_the_top_of_the_library_has_few_entries() -> None:
    assert len({name.split(".")[0] for name in module_files()}) <= MAX_ENTRIES


@pytest.mark.parametrize(
    "choice",
    [f"{group}={path.stem}" for group in ("data", "model", "recipe", "engine")
     for path in sorted((ROOT / "conf" / group).glob("*.yaml"))],
)  # fmt: skip
def test_every_shipped_choice_composes(choice: str) -> None:
    assert compose(RunConfig, "config", [choice])
