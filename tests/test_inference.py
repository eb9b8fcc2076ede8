"""Whole-image prediction against interpolation and argmax of the library."""

import torch
import torch.nn.functional as F
from torch import nn

from segformer.inference import predict
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig


class Halves(nn.Module):
    """Logits of a quarter of the size: class 0 wins on the left half, class 1 on the right."""

    def forward(self, images):
        columns = torch.linspace(-1, 1, images.shape[3] // 4)
        rows = images.shape[2] // 4
        return torch.stack([-columns, columns])[None, :, None].expand(len(images), 2, rows, -1)


def test_predict_splits_the_image_where_the_logits_cross():
    mask = predict(Halves(), torch.zeros(2, 3, 32, 64), (50, 100))
    assert mask.dtype == torch.uint8
    assert torch.equal(mask, (torch.arange(100) >= 50).to(torch.uint8).expand(2, 50, 100))


def test_predict_is_the_argmax_of_the_enlarged_logits():
    torch.manual_seed(0)
    model = build_model(ModelConfig(), 7).eval()
    images = torch.randn(2, 3, 61, 83)
    with torch.no_grad():
        logits = F.interpolate(model(images), (90, 75), mode="bilinear", align_corners=False)
    mask = predict(model, images, (90, 75))
    chosen = logits.gather(1, mask.long()[:, None])[:, 0]
    # where two classes tie within rounding either may win
    torch.testing.assert_close(chosen, logits.amax(1), atol=1e-5, rtol=0)


def test_the_mode_of_the_model_is_left_alone():
    model = Halves().train()
    predict(model, torch.zeros(1, 3, 32, 32), (32, 32))
    assert model.training
