"""MiT-nano, for tests of ranks: every kind of parameter, few of each, and odd numbers of them.

`nano.py <script> [arguments]` runs a script that knows it.
"""

import runpy
import sys

from segformer.models.variants import VARIANTS, Variant

SIZE = ("nano", Variant(embed_dims=(8, 16, 40, 64), depths=(1, 1, 1, 1), decoder_dim=37))

if __name__ == "__main__":  # a loader's process imports this file, too
    VARIANTS.update([SIZE])
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
