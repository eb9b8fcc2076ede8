"""Export a run: python launch/export.py run=runs/sample [out=<folder>] [step=best|<step>]"""

from segformer.command import importing

with importing(__name__):
    from segformer.config import cli
    from segformer.export import ExportConfig, export

if __name__ == "__main__":
    cli(ExportConfig, "export", export)
