"""Convert weights between formats.

python launch/convert.py source=<file, directory or run> out=<directory or .pth> to=ours|hf|nvlabs|smp|mmseg
"""

from segformer.command import importing

with importing(__name__):
    from segformer.config import cli
    from segformer.conversion import ConvertConfig, convert

if __name__ == "__main__":
    cli(ConvertConfig, "convert", convert)
