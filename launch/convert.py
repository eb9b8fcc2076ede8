"""Convert weights between formats.

python launch/convert.py checkpoint=<file, folder or run> output=<folder or .pth> to=ours|hf|nvlabs|smp|mmseg
"""

from segformer.errors import importing

with importing(__name__):
    from segformer.inference.convert import ConvertConfig, convert
    from segformer.training.config import cli

if __name__ == "__main__":
    cli(ConvertConfig, "convert", convert)
