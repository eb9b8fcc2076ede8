"""Compare runs: scores with intervals, curves, settings, the same images.

python launch/compare.py runs/a runs/b runs/c
python launch/compare.py runs=[runs/a,runs/b] output=comparison
python launch/compare.py runs/lr         every run in a folder, as of a sweep

The first run is the one that the others are held against. Prints a table and
writes <output>/index.html, a page that opens offline, and
<output>/comparison.csv.
"""

import json
import sys

from segformer.errors import importing

with importing(__name__):
    from segformer.inference.compare import CompareConfig, compare
    from segformer.training.choices import take_conf
    from segformer.training.config import cli

if __name__ == "__main__":
    conf, given = take_conf(sys.argv[1:])
    paths = [one for one in given if "=" not in one and not one.startswith("-")]
    others = [*conf, *(one for one in given if one not in paths)]
    sys.argv[1:] = [*([f"runs=[{','.join(map(json.dumps, paths))}]"] if paths else []), *others]
    cli(CompareConfig, "compare", compare)
