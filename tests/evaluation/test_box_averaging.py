"""Box averaging against a case that was computed by hand."""

import pytest
import torch

from dk_detection.evaluation.box_averaging import average_boxes

# Kept is the first box. The second overlaps it by 80 of 120 (IoU 2/3), the third by 60 of 140 (3/7), the fourth is the
# second again, of another class, and the last lies elsewhere.
BOXES = torch.tensor([[0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10], [2, 0, 12, 10], [50, 50, 60, 60]]).float()
SCORES = torch.tensor([0.9, 0.6, 0.5, 0.8, 0.7])
LABELS = torch.tensor([1, 1, 1, 2, 1])


@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({}, 1.2 / 1.5),  # (0.9 * 0 + 0.6 * 2) / (0.9 + 0.6)
        # Moved by 0.8 it overlaps the third by 68 of 132 (0.515): (0.6 * 2 + 0.5 * 4) / (0.9 + 0.6 + 0.5)
        (dict(iterations=2), 3.2 / 2),
        (dict(iterations=3), 3.2 / 2),  # and there it stays
        (dict(iou_threshold=0.4), 3.2 / 2),
        (dict(iou_threshold=0.7), 0),
        (dict(iterations=0), 0),
    ],
)
def test_by_hand(options, x):
    averaged = average_boxes(BOXES[:1], LABELS[:1], BOXES, SCORES, LABELS, **options)
    torch.testing.assert_close(averaged, torch.tensor([[x, 0, 10 + x, 10]], dtype=torch.float))


def test_each_class_by_itself():
    kept = BOXES[[0, 3, 4]]
    averaged = average_boxes(kept, LABELS[[0, 3, 4]], BOXES, SCORES, LABELS)
    torch.testing.assert_close(averaged[1:], kept[1:])


@pytest.mark.parametrize("number", [0, 3])
def test_nothing_to_average(number):
    """Without scores, without boxes, and with boxes that are empty, all stays where it is."""
    kept = torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 0.0, 8.0]])[:number]
    labels = torch.zeros(number, dtype=torch.long)
    torch.testing.assert_close(average_boxes(kept, labels, kept, torch.zeros(number), labels), kept)
    torch.testing.assert_close(average_boxes(kept, labels, kept, torch.ones(number), labels), kept)
    nothing = torch.zeros(0, 4)
    torch.testing.assert_close(average_boxes(kept, labels, nothing, torch.zeros(0), torch.zeros(0)), kept)
