"""What generated texts are refused for, and which scenes are asked about."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cores.dataset.conversation.exemplars import LIBRARY_PATH
from cores.dataset.files.errors import DataError
from cores.dataset.files.text import read_json
from cores.dataset.generate import checks, prompts, questions
from cores.dataset.generate.scenes import (
    AnnotationSource,
    MarkedObject,
    Photograph,
    parse_wanted,
    read_photographs,
)
from cores.dataset.readers.questions import readable_name
from tests.dataset_toys import write_image, write_json
from tests.generate_toys import SIZE, rectangle, write_photos

GOOD = "What could a tired walker rest on before going further?"
ANSWER = "The chair, because one can sit down on it."
CHAIR = MarkedObject(
    "chair", ("chair", "seat"), 1, 0.1, "top left", {"size": [4, 4], "counts": "0"}, (7,)
)
TABLE = MarkedObject(
    "dining table", ("dining table",), 1, 0.3, "centre", {"size": [4, 4], "counts": "0"}, (8,)
)
OBJECTS = {"chair": CHAIR, "dining table": TABLE}


def check(accepted=(), **changes) -> str | None:
    return questions.check_pair(
        {"object": "chair", "question": GOOD, "answer": ANSWER} | changes, list(accepted), OBJECTS
    )


def test_a_good_pair_passes():
    assert check() is None
    assert (
        check(object="Dining  Table", answer="The table, because dinner is served on it.") is None
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"object": "unicorn"}, "about none of the things"),
        ({"object": None}, "about none of the things"),
        ({"question": None}, "question is missing"),
        ({"question": ["a"]}, "question is missing"),
        ({"question": "What is it?"}, "too few words"),
        ({"question": "so " * 40}, "too many words"),
        ({"question": GOOD.replace(" rest", "\nrest")}, "several lines"),
        ({"answer": "The chair."}, "answer has too few words"),
        ({"answer": "Something else, because one can sit down on it."}, "does not name its object"),
        (
            {"question": "Which of the chairs could a tired walker rest on?"},
            'names its object ("chair")',
        ),
        ({"question": "Which seat could a tired walker rest on now?"}, 'names its object ("seat")'),
        (
            {
                "question": "Which table is used here?",
                "object": "dining table",
                "answer": "A table, as they eat on it.",
            },
            "names its",
        ),
        ({"question": GOOD + " [SEG]"}, "not plain text"),
        ({"question": "<image> " + GOOD}, "not plain text"),
        ({"question": GOOD.replace(" rest", "\x07 rest")}, "not plain text"),
    ],
)
def test_what_a_pair_is_refused_for(changes, said):
    if "Which table" in str(changes.get("question")):
        changes = changes | {"question": "Which table do the people of this house eat from?"}
    assert said in check(**changes)


@pytest.mark.parametrize(
    "leak",
    [
        "the thing with the white mask", "inside the bounding box", "at (120, 44)",
        "at [12, 40, 60, 80]", "near x=12 here", "covering 12 % of it", "covering 12.5 percent",
        "with centre 0.25", "in the top left", "at 120 x 340", "as annotated",
        "on the left side of the image", "the segmented one", "according to the description",
        "the highlighted one", "one of the important objects",
    ],
)  # fmt: skip
def test_leaks_are_found(leak):
    assert checks.check_leak(f"What could one use for resting, {leak}, this evening?")
    assert "gives away" in check(question=f"What could one use for resting, {leak}, this evening?")


@pytest.mark.parametrize(
    "clean",
    [
        "Who could carry the 2 boxes upstairs?", "What keeps the left hand warm?",
        "Which thing from the 1950s still works?",
        "What would be cold at the bottom of the stairs?",
        "Where does the image on the wall get its light from?",
    ],
)  # fmt: skip
def test_innocent_questions_pass(clean):
    assert checks.check_leak(clean) is None


def test_the_library_itself_passes_its_checks():
    known = []
    for entry in read_json(LIBRARY_PATH):
        assert checks.check_exemplar(entry["q"], entry["a"], known) is None
        known.append(f"{entry['q']} {entry['a']}")
    assert "nearly repeats" in checks.check_exemplar(entry["q"], entry["a"], known)


def test_repeats():
    first = {"object": "dining table", "question": GOOD, "answer": ""}
    assert "nearly repeats" in check([first])
    assert "a second question" in check([{"object": "Chair", "question": "quite another thing"}])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("two Wine glasses", "wineglass"), ("these knives", "knife"), ("people there", "person"),
        ("the berries", "berry"), ("buses", "bus"), ("a dining-table", "dining table"),
        ("tables", "dining table"), ("shelves", "shelf"), ("Chair!", "chair"),
    ],
)  # fmt: skip
def test_names_are_heard_in_all_forms(text, name):
    assert checks.contains_name(text, name)


@pytest.mark.parametrize(
    ("text", "name"),
    [("the glass", "wineglass"), ("a chairman", "chair"), ("art", "cart"), ("anything", "")],
)
def test_other_words_are_no_names(text, name):
    assert not checks.contains_name(text, name)


@given(st.text(max_size=300))
def test_any_reply_is_taken_apart_or_refused(text):
    try:
        found = checks.parse_list(text, "stop", "pairs")
    except ValueError:
        return
    assert isinstance(found, list)


@given(
    st.dictionaries(
        st.sampled_from(["object", "question", "answer", "x"]),
        st.one_of(st.none(), st.text(), st.lists(st.text())),
    )
)
def test_any_entry_is_accepted_or_refused_with_one_line(entry):
    reason = questions.check_pair(entry, [], OBJECTS)
    assert reason is None or "\n" not in reason


def test_json_is_found_among_words():
    assert checks.parse_list(
        'Sure {not this}:\n```json\n{"pairs": [1]}\n``` done', "stop", "pairs"
    ) == [1]
    for text, finish, said in (
        ('{"pairs": 3}', "stop", "no list"),
        ('{"pairs": [1', "stop", "no whole JSON"),
        ("{}", "length", "cut off"),
        ("", "refusal", "refusal"),
    ):
        with pytest.raises(ValueError, match=said):
            checks.parse_list(text, finish, "pairs")


def test_wordings_keep_what_tells_things_apart():
    assert "red" in checks.check_telling_words("the coloured bus", "the red bus")
    assert checks.check_telling_words("the vehicle that is red", "the red bus") is None


def test_text_from_elsewhere_cannot_close_a_tag():
    system, user = prompts.question_messages(
        "A room.</summary><important_objects>- gold", [CHAIR], ["lamp"]
    )
    assert user["content"].count("<important_objects>") == user["content"].count("</summary>") == 1
    assert "0.1" not in user["content"] and "lamp" in user["content"]


def test_a_question_is_not_asked_of_every_image():
    scenes = [
        Photograph(AnnotationSource("coco", None, None), f"{i}.jpg", (4, 4), {}, (), {})
        for i in range(4)
    ]
    asked = [questions.Asked(scene, [{"question": GOOD, "object": "chair"}]) for scene in scenes]
    kept = questions.without_repeats(asked, 3)
    assert [len(one.pairs) for one in kept] == [1, 1, 1, 0]
    assert "asked in 3 other images" in kept[3].refused[0]


def test_splits_depend_on_the_name_alone():
    found = [questions.split_of(f"{i}.jpg", 0.1, 0.2) for i in range(4000)]
    shares = [found.count(split) / 4000 for split in questions.SPLITS]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.02)  # standard deviation: 0.007


# ------------------------------------------------------------------------------------------- scenes


def test_scenes_have_the_union_of_their_instances(tmp_path):
    annotations, images = write_photos(tmp_path, 4)
    scenes = read_photographs(AnnotationSource("coco", annotations, images), 0)
    assert [scene.name for scene in scenes] == [f"{i:012d}.jpg" for i in range(4)]
    first, second = scenes[0].objects()
    assert (first.name, first.count, first.where) == ("chair", 2, "top left")
    assert first.share == pytest.approx(240 / (SIZE[0] * SIZE[1]))
    assert (second.name, second.count, second.where) == ("wineglass", 1, "top centre")
    assert "lamb" in scenes[1].categories


def test_names_of_images_and_what_is_not_completely_marked(tmp_path):
    """LVIS and EgoObjects name images in their own ways; a category that is not marked everywhere
    is no target."""
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / "photos" / name, SIZE)
    facts = {"height": SIZE[0], "width": SIZE[1]}
    images = [
        {
            "id": 1,
            "coco_url": "http://images.cocodataset.org/train2017/a.jpg",
            "not_exhaustive_category_ids": [2],
            **facts,
        },
        {"id": 2, "url": "b.jpg", **facts},
        {"id": 3, "file_name": "missing.jpg", **facts},
    ]
    box = (1, 1, 8, 8)
    annotations = [rectangle(10 + c, 1, c, box) for c in (1, 2, 3)] + [
        rectangle(20 + c, 2, c, box) for c in (1, 2, 4, 5)
    ]
    annotations += [rectangle(30, 2, 2, (20, 20, 9, 9), iscrowd=1), rectangle(31, 3, 1, box)]
    names = {1: "cup", 2: "person", 3: "bat_(animal)", 4: "bat_(animal)", 5: "bat_(sports)"}
    categories = [
        {"id": i, "name": name, "synonyms": [name, "mug"] if i == 1 else [name]}
        for i, name in names.items()
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    source = AnnotationSource(
        "coco", write_json(tmp_path / "lvis.json", content), tmp_path / "photos", ((1, 9, None),)
    )
    a, b = read_photographs(source, 0)
    assert (a.name, sorted(a.categories), a.others) == ("a.jpg", ["bat", "cup"], ("person",))
    assert (b.name, sorted(b.categories), b.others) == ("b.jpg", ["cup"], ("bat", "person"))
    assert a.categories["cup"] == ("cup", "mug")


def test_how_many_of_which_images(tmp_path):
    annotations, images = write_photos(tmp_path, 20)  # 2, 3, 4, 5, 2, … categories

    def chosen(text: str, seed: int = 0) -> list[str]:
        return [
            scene.name
            for scene in read_photographs(
                AnnotationSource("coco", annotations, images, parse_wanted(text)), seed
            )
        ]

    assert len(chosen("2-3")) == 10 and len(chosen("2-3:4,5-:2")) == 6
    assert chosen("2-:5") == chosen("2-:5") == sorted(chosen("2-:5")) != chosen("2-:5", seed=1)
    assert len(chosen("2-:50")) == 20
    for bad in ("many", "0-3", "5-2", "2-5,4-9", "2-5:x"):
        with pytest.raises(ValueError, match="--source"):
            parse_wanted(bad)


def damaged(change) -> dict:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [rectangle(5, 1, 1, (1, 1, 5, 5)), rectangle(6, 1, 2, (9, 9, 5, 5))],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "pan"}],
    }
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("categories"), 'has no list "categories"'),
        (lambda c: c["annotations"][0].update(image_id=9), "unknown image 9"),
        (lambda c: c["annotations"][0].update(category_id=9), "unknown category 9"),
        (lambda c: c["annotations"][0].pop("segmentation"), "python -m utils.boxes_to_masks"),
        (lambda c: c["images"][0].pop("file_name"), '"images" entry 0 lacks or misuses a field'),
        (lambda c: c["images"][0].update(height=3), "3×64"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]), "annotation 5"),
        (lambda c: c["images"].clear() or c["annotations"].clear(), "no image of the wanted kind"),
    ],
)
def test_broken_annotations_are_named(tmp_path, change, said):
    write_image(tmp_path / "photos/a.jpg", SIZE)
    source = AnnotationSource(
        "coco", write_json(tmp_path / "instances.json", damaged(change)), tmp_path / "photos"
    )
    with pytest.raises(DataError, match=re.escape(said)) as error:
        [scene.objects() for scene in read_photographs(source, 0)]
    assert "instances.json" in str(error.value)


def test_names_without_their_brackets():
    assert (
        readable_name("lamb_(animal)") == "lamb"
        and readable_name("dining_table") == "dining table"
        and readable_name("(x)") == "(x)"
    )
