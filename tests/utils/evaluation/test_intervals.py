"""Intervals of a report are drawn over images: targets of one image rise and fall together."""

from cores.utils.metrics import TargetScore, breakdown, summarise_scores


def score(image: str, conversation: int, iou: float) -> TargetScore:
    return TargetScore(
        dataset="toy",
        id=image,
        conversation=conversation,
        target=0,
        query="where?",
        is_sentence=False,
        inter=round(100 * iou),
        union=100,
        iou=iou,
        emitted=True,
        extra_masks=0,
        target_area=100,
        image_area=1000,
    )


def test_targets_of_an_image_are_drawn_together():
    """Two images with twenty targets each, all wrong in one and all right in the other: of two
    images, both drawn are the same one half of the time. Forty targets drawn one by one would have
    an interval from about 0.35 to 0.65."""
    scores = [score(image, i, iou) for image, iou in (("a", 0.0), ("b", 1.0)) for i in range(20)]
    found = summarise_scores(scores)
    assert found["giou"] == 0.5
    assert found["giou_ci95"] == found["ciou_ci95"] == [0.0, 1.0]
    (by_length,) = breakdown(scores)["query_length"].values()
    assert by_length["giou_ci95"] == [0.0, 1.0]
