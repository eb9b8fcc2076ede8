"""Show a model's masks on a local page, and answer programs over HTTP.

python launch/serve.py checkpoint=runs/mine
python launch/serve.py checkpoint=runs/mine/export_onnx port=0 batch=4
"""

from segformer.errors import importing

with importing(__name__):
    from segformer.inference.serving.serve import ServeConfig, serve
    from segformer.training.config import cli

if __name__ == "__main__":
    cli(ServeConfig, "serve", serve)
