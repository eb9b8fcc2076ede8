"""MiT-nano, for tests of ranks: every kind of parameter, few of each, and odd numbers of them."""

from segformer.models.variants import Variant

SIZE = ("nano", Variant(embed_dims=(8, 16, 40, 64), depths=(1, 1, 1, 1), decoder_dim=37))
