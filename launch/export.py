"""Export a run for prediction and fine-tuning.

python launch/export.py checkpoint=runs/sample output=exports/sample
python launch/export.py checkpoint=runs/sample step=best
python launch/export.py checkpoint=runs/sample to=onnx argmax=true
python launch/export.py checkpoint=runs/sample to=openvino int8=true
"""

from segformer.errors import importing

with importing(__name__):
    from segformer.inference.export import ExportConfig, export
    from segformer.training.config import cli

if __name__ == "__main__":
    cli(ExportConfig, "export", export)
