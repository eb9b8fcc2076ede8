"""Convert weights between formats.

python launch/convert.py checkpoint=segformer.b2.pth output=exports/b2
python launch/convert.py checkpoint=runs/sample output=b0.pth to=nvlabs
"""

from segformer.errors import importing

with importing(__name__):
    from segformer.inference.convert import ConvertConfig, convert
    from segformer.training.config import cli

if __name__ == "__main__":
    cli(ConvertConfig, "convert", convert)
