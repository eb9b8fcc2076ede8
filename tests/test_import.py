"""`import segformer` and its model need torch, numpy and safetensors, nothing else of ours or others'."""

import subprocess
import sys

import segformer

FORBIDDEN = (
    *("cv2", "PIL", "deepspeed", "webdataset", "hydra", "omegaconf", "torchmetrics", "wandb"),
    *("tqdm", "matplotlib", "transformers", "onnx", "scipy", "pandas", "tensorboard", "pynvml"),
)
SCRIPT = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Refuse())
import segformer
"""


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT + code], capture_output=True, text=True, check=False
    )


def test_the_model_works_where_only_torch_numpy_and_safetensors_are_installed():
    done = run(
        """
import torch
model = segformer.build_model(segformer.ModelConfig(variant="b0"), num_classes=3)
assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 16, 16)
assert segformer.ModelConfig().variant in segformer.VARIANTS
"""
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_documented():
    assert all(getattr(segformer, name).__doc__ for name in segformer.__all__)


def test_the_bare_import_loads_none_of_the_training_system():
    done = run("print(*[name for name in sys.modules if name.startswith('segformer.')])")
    assert done.stdout.split() == []
