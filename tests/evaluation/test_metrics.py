"""The counts and scores of both tasks against naive loops and closed forms."""

import csv
import io
import json
import statistics

import numpy as np
import pytest
import torch

from segformer.errors import DataError
from segformer.evaluation.metrics import (
    ClassificationMetric,
    ClassificationScores,
    SegmentationMetric,
    SegmentationScores,
)
from segformer.evaluation.tables import as_csv, as_markdown


def chosen(prediction, classes=5):
    """Logits (B, K, H, W) whose argmax is the prediction (B, H, W)."""
    return torch.nn.functional.one_hot(prediction.long(), classes).permute(0, 3, 1, 2).float()


def batches(classes=5, count=3):
    torch.manual_seed(0)
    for _ in range(count):
        target = torch.randint(0, classes, (2, 6, 7), dtype=torch.uint8)
        target[torch.rand(target.shape) < 0.2] = 255
        yield torch.randint(0, classes, (2, 6, 7), dtype=torch.uint8), target


def test_confusion_equals_a_loop_over_pixels_and_batches():
    metric = SegmentationMetric(5)
    expected = [[0] * 5 for _ in range(5)]
    for prediction, target in batches():
        metric.update(chosen(prediction), target)
        for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True):
            if t != 255:
                expected[t][p] += 1
    assert metric.compute().confusion == expected
    assert metric.counts.dtype == torch.int64


def test_scores_equal_set_operations_on_the_pixels():
    prediction, target = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    metric = SegmentationMetric(5)
    metric.update(chosen(prediction), target)
    scores = metric.compute()
    valid = target != 255
    for k in range(5):
        labelled, predicted = (target == k) & valid, (prediction == k) & valid
        both, either = (labelled & predicted).sum().item(), (labelled | predicted).sum().item()
        assert scores.iou[k] == pytest.approx(both / either)
        assert scores.acc[k] == pytest.approx(both / labelled.sum().item())
        assert scores.precision[k] == pytest.approx(both / predicted.sum().item())
        assert scores.f1[k] == pytest.approx(statistics.harmonic_mean([scores.precision[k], scores.acc[k]]))
    assert scores.aacc == pytest.approx((prediction == target)[valid].float().mean().item())
    assert scores.miou == pytest.approx(sum(scores.iou) / 5)
    assert scores.macc == pytest.approx(sum(scores.acc) / 5)


def test_logits_of_a_lower_resolution_are_enlarged_before_they_are_compared():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 5, 4, 3), torch.randint(0, 5, (2, 14, 11), dtype=torch.uint8)
    metric, enlarged = SegmentationMetric(5), SegmentationMetric(5)
    metric.update(logits, target)
    enlarged.update(torch.nn.functional.interpolate(logits, (14, 11), mode="bilinear"), target)
    assert torch.equal(metric.counts, enlarged.counts)


def test_absent_classes_are_none_and_outside_the_means():
    # class 0: labelled 4, right 2; class 1: labelled 2, right 2, predicted 3; 2: absent; 3: only predicted
    confusion = torch.tensor([[2, 1, 0, 1], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = SegmentationScores.from_counts(confusion)
    assert scores.iou == [2 / 4, 2 / 3, None, 0.0]
    assert scores.acc == [2 / 4, 1.0, None, None]
    assert scores.precision == [1.0, 2 / 3, None, 0.0]
    assert scores.f1 == [2 * 2 / (2 + 4), 2 * 2 / (3 + 2), None, 0.0]
    never = SegmentationScores.from_counts(torch.tensor([[2, 0, 0], [3, 0, 0], [0, 0, 0]]))
    assert never.precision == [2 / 5, 0.0, None]  # labeled, never predicted: as zero_division=0
    assert scores.miou == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)
    assert scores.macc == pytest.approx(3 / 4)
    assert scores.aacc == pytest.approx(4 / 6)


def test_counts_beyond_the_integers_of_float32_stay_exact():
    metric = SegmentationMetric(2)
    metric.counts += torch.tensor([[2**40 + 1, 0], [0, 3]])
    metric.update(chosen(torch.zeros(1, 1, 1), 2), torch.zeros(1, 1, 1, dtype=torch.uint8))
    assert metric.compute().confusion == [[2**40 + 2, 0], [0, 3]]


def test_a_label_outside_the_classes_is_refused_and_named():
    target = torch.tensor([[[0, 1, 7, 255]]], dtype=torch.uint8)
    with pytest.raises(DataError, match=r"labels \[7\], but the model has 3 classes \(0 to 2, 255"):
        SegmentationMetric(3).update(chosen(torch.zeros_like(target), 3), target)
    with pytest.raises(DataError, match=r"labels \[3\]"):
        ClassificationMetric(3).update(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_an_ignored_batch_counts_nothing():
    metric = SegmentationMetric(3)
    metric.update(chosen(torch.zeros(1, 2, 2), 3), torch.full((1, 2, 2), 255))
    scores = metric.compute()
    assert scores.iou == [None, None, None]
    assert scores.miou != scores.miou  # NaN: nothing was measured


def test_table_is_aligned_and_ends_with_the_means():
    scores = SegmentationScores.from_counts(torch.tensor([[1200, 300, 0], [100, 400, 0], [0, 0, 0]]))
    assert scores.table(["background", "nucleus", "debris"]).split("\n") == [
        "class         IoU  accuracy  precision     F1  pixels",
        "-----------------------------------------------------",
        "background  75.00     80.00      92.31  85.71   1,500",
        "nucleus     50.00     80.00      57.14  66.67     500",
        "debris          -         -          -      -       0",
        "-----------------------------------------------------",
        "mean        62.50     80.00      74.73  76.19   2,000",
    ]


def test_csv_and_markdown_hold_the_table_whatever_the_names_are():
    scores = SegmentationScores.from_counts(torch.tensor([[1200, 300, 0], [100, 400, 0], [0, 0, 0]]))
    rows = scores.rows(["a, b", "a|b", "c\nd"])
    first, *_, mean = read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["class"] for row in read] == ["a, b", "a|b", "c\nd", "mean"]
    assert float(first["IoU"]) == 0.75
    assert read[2]["IoU"] == ""
    assert float(mean["F1"]) == pytest.approx((6 / 7 + 2 / 3) / 2)
    head, rule, *lines = as_markdown(rows).splitlines()
    assert len(lines) == 4
    assert head == "| class | IoU | accuracy | precision | F1 | pixels |"
    assert rule.count("|") == head.count("|")
    assert lines[0] == "| a, b | 75.00 | 80.00 | 92.31 | 85.71 | 1,500 |"
    assert lines[1].startswith("| a\\|b | 50.00")


def test_details_are_json_with_the_recall_and_null_where_nothing_was_measured():
    scores = SegmentationScores.from_counts(torch.zeros(2, 2, dtype=torch.int64))
    details = json.loads(json.dumps(scores.details(), allow_nan=False))
    assert details["miou"] is None
    assert details["recall"] == details["precision"] == details["f1"] == [None, None]


def test_top_1_and_top_5_equal_a_sort_of_every_image():
    generator = np.random.default_rng(0)
    metric, hits = ClassificationMetric(9), np.zeros((9, 3), int)
    for _ in range(4):
        logits, target = generator.normal(size=(20, 9)), generator.integers(0, 8, 20)  # class 8 never occurs
        metric.update(torch.from_numpy(logits), torch.from_numpy(target))
        for row, label in zip(logits, target, strict=True):
            best = sorted(range(9), key=lambda k, row=row: -row[k])
            hits[label] += (1, best[0] == label, label in best[:5])
    scores = metric.compute()
    assert scores.counts == hits.tolist()
    assert metric.counts.dtype == torch.int64
    assert (scores.top1, scores.top5) == (hits[:, 1].sum() / 80, hits[:, 2].sum() / 80)
    assert scores.acc == [*(hits[:8, 1] / hits[:8, 0]), None]
    assert scores.macc == pytest.approx(np.mean(hits[:8, 1] / hits[:8, 0]))
    assert scores.summary().startswith(f"top-1 {100 * scores.top1:.2f}%, top-5 {100 * scores.top5:.2f}%")


def test_a_model_that_says_nothing_is_right_for_its_first_class_only():
    metric = ClassificationMetric(3)
    metric.update(torch.zeros(3, 3), torch.tensor([0, 1, 2]))
    assert [row[1] for row in metric.compute().counts] == [1, 0, 0], "as argmax of equals"
    broken = ClassificationMetric(7)
    broken.update(torch.full((3, 7), torch.nan), torch.tensor([0, 1, 2]))
    broken.update(torch.tensor([[0.0, torch.nan, 1.0, 2.0, 3.0, 4.0, 5.0]]), torch.tensor([6]))
    assert broken.compute().top1 == broken.compute().top5 - 0.25 == 0, "beside a NaN it is second at best"


def test_with_fewer_than_five_classes_all_are_among_the_first_five():
    metric = ClassificationMetric(3)
    metric.update(torch.tensor([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]]), torch.tensor([0, 1]))
    assert (metric.compute().top1, metric.compute().top5) == (0.5, 1.0)


def test_a_class_name_takes_one_line_of_a_table_whatever_is_in_it():
    counts = torch.tensor([[4, 1], [0, 5]])
    lines = SegmentationScores.from_counts(counts).table(["a\n\x1b[2Jmean  99.99", "b"]).split("\n")
    assert len(lines) == 6
    assert lines[2].startswith("a\\n\\x1b[2Jmean  99.99  80.00")


def test_the_table_of_classes_ends_with_all_images():
    scores = ClassificationScores.from_counts(torch.tensor([[1200, 900, 1140], [300, 60, 150], [0, 0, 0]]))
    assert scores.table(["cat", "dog", "owl"]).split("\n") == [
        "class  top-1  top-5  images",
        "---------------------------",
        "cat    75.00  95.00   1,200",
        "dog    20.00  50.00     300",
        "owl        -      -       0",
        "---------------------------",
        "all 3  64.00  86.00   1,500",
    ]


def test_of_many_classes_the_table_has_those_that_are_recognized_worst():
    counts = torch.tensor([[100, hits, 100] for hits in range(100)])
    lines = ClassificationScores.from_counts(counts).table([f"c{k}" for k in range(100)]).split("\n")
    assert [line.split()[0] for line in lines[2:-2]] == [f"c{k}" for k in range(20)]
    assert lines[-1].split() == ["all", "100", "49.50", "100.00", "10,000"]


@pytest.mark.parametrize(
    ("kind", "counts"),
    [(SegmentationScores, [[2, 1], [0, 2]]), (ClassificationScores, [[2, 1, 2], [1, 1, 1]])],
)
def test_scores_survive_json(kind, counts):
    scores = kind.from_counts(torch.tensor(counts))
    assert kind(**json.loads(json.dumps(scores.to_dict()))) == scores


def test_pictures_are_no_part_of_the_numbers():
    scores = SegmentationScores.from_counts(torch.tensor([[2, 1], [0, 2]]))
    scores.pictures = {"a": np.zeros((2, 6, 3), np.uint8)}
    assert "pictures" not in scores.to_dict()
    assert scores == SegmentationScores.from_counts(torch.tensor([[2, 1], [0, 2]]))
    assert scores.summary() == "mIoU 66.67%, mAcc 83.33%, aAcc 80.00%"
    assert scores.score == scores.miou


def test_fwiou_dice_and_classes_left_out_are_closed_forms_of_the_matrix():
    counts = torch.tensor([[6, 2, 0, 0], [1, 7, 2, 0], [0, 0, 4, 0], [0, 0, 0, 0]])  # the last is nowhere
    iou, dice, share = [6 / 9, 7 / 12, 4 / 6], [12 / 15, 14 / 19, 8 / 10], [8 / 22, 10 / 22, 4 / 22]
    scores = SegmentationScores.from_counts(counts)
    assert scores.fwiou == pytest.approx(sum(a * b for a, b in zip(iou, share, strict=True)))
    assert scores.mdice == pytest.approx(statistics.mean(dice))
    found = SegmentationScores.from_counts(counts, left_out=[1])
    assert found.miou == pytest.approx((iou[0] + iou[2]) / 2), "its pixels still count in the others' unions"
    assert found.mdice == pytest.approx((dice[0] + dice[2]) / 2)
    assert found.fwiou == pytest.approx((8 * iou[0] + 4 * iou[2]) / 12)
    assert (found.iou, found.confusion, found.aacc) == (scores.iou, scores.confusion, scores.aacc)
    assert found.to_dict().keys() == scores.to_dict().keys()
    assert "left_out" not in found.to_dict(), "the log's lines are as they were"
