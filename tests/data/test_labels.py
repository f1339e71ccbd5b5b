"""Labels index the head's outputs, or a one-line error says why not."""

import importlib.util
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.data import imagenet
from fcvit_jax.data.batches import eval_batches, train_batches
from fcvit_jax.data.labels import UnknownOrder, match_head, read_class_names, real_labels
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.data.sources import Record, Source, open_source
from fcvit_jax.errors import InputError

SYNSETS = imagenet.synsets()
WORDS = [f"thing {index}" for index in range(1000)]
HEADS = [None, list(SYNSETS), WORDS]  # a head without names, named by synsets, named in words
IMAGENETTE = [
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
    "n03394916", "n03417042", "n03425413", "n03445777", "n03888257",
]  # fmt: skip


def source_of(*classes: str, labels=None, **fields) -> Source:
    """Make a source with one record of each class, in their order, or of each of `labels`."""
    labels = labels or range(len(classes))
    return Source("set:x", classes, len(labels), lambda i: Record(b"", labels[i], f"image {i}"), **fields)


def labels_of(source: Source) -> list[int | tuple[int, ...]]:
    return [record.label for record in source]


@pytest.mark.parametrize("names", HEADS)
def test_imagenets_synsets_are_taken_in_their_order(names):
    source = match_head(source_of(*SYNSETS), 1000, names, "dir")
    assert labels_of(source) == [*range(1000)]
    assert source.class_names == tuple(names or SYNSETS)
    assert source.scored is None
    # In another order, each by its name.
    source = match_head(source_of(*SYNSETS[::-1]), 1000, names, "dir")
    assert labels_of(source) == [*range(999, -1, -1)]


@pytest.mark.parametrize("names", HEADS)
@pytest.mark.parametrize(
    ("classes", "outputs"),
    [
        (IMAGENETTE, [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]),
        ([SYNSETS[i] for i in imagenet.IMAGENET_A], [*imagenet.IMAGENET_A]),
        ([SYNSETS[i] for i in imagenet.IMAGENET_R], [*imagenet.IMAGENET_R]),
        ([SYNSETS[7], SYNSETS[3]], [7, 3]),
    ],
)
def test_some_of_imagenets_classes_are_scored_among_themselves(names, classes, outputs):
    source = match_head(source_of(*classes), 1000, names, "dir")
    assert labels_of(source) == outputs
    assert source.scored == tuple(sorted(outputs))
    assert source.class_names == tuple(names or SYNSETS)
    assert [record.name for record in source] == [f"image {i}" for i in range(len(classes))]


@pytest.mark.parametrize("names", HEADS)
def test_existing_scoring_is_kept(names):
    source = match_head(source_of(*SYNSETS, scored=imagenet.IMAGENET_A), 1000, names, "dir")
    assert source.scored == imagenet.IMAGENET_A
    source = match_head(source_of(*SYNSETS[::-1], scored=(0, 5)), 1000, names, "dir")
    assert source.scored == (994, 999)


@pytest.mark.parametrize("names", HEADS)
@pytest.mark.parametrize("style", ["{}", "{:04d}"])
def test_a_thousand_numbers_are_the_heads_outputs(names, style):
    source = match_head(source_of(*(style.format(i) for i in range(1000))), 1000, names, "dir")
    assert labels_of(source) == [*range(1000)]
    assert source.class_names == (tuple(names) if names else SYNSETS)
    assert source.scored is None


def test_folders_of_imagenet_v2_sort_by_number(tmp_path):
    for index in range(1000):
        (tmp_path / str(index)).mkdir()
    for index in (2, 10, 999):
        (tmp_path / str(index) / "image.jpeg").write_bytes(b"pixels")
    source = match_head(open_source(f"folder:{tmp_path}"), 1000, WORDS, "dir")
    assert [(record.name, record.label) for record in source] == [
        (f"{index}/image.jpeg", index) for index in (2, 10, 999)
    ]


def test_folders_named_by_synsets_are_mapped(tmp_path):
    for name in IMAGENETTE:
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.jpeg").write_bytes(name.encode())
    source = match_head(open_source(f"folder:{tmp_path}"), 1000, None, "dir")
    assert [(record.image, SYNSETS[int(str(record.label))]) for record in source] == [
        (name.encode(), name) for name in IMAGENETTE
    ]


def test_a_head_of_the_same_names_keeps_the_labels():
    for names in (list("abc"), IMAGENETTE):
        source = source_of(*names)
        assert match_head(source, len(names), names, "dir") is source
    source = match_head(source_of(*"abc"), 3, None, "dir")  # nothing contradicts it
    assert labels_of(source) == [0, 1, 2]
    assert source.remarks == (
        "the head of dir has no class names: its 3 outputs are assumed to be the classes of set:x in sorted order; "
        "state them with class_names",
    )


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)])
def test_classes_are_matched_by_name(order):
    names = ["cat", "dog", "eel"]
    source = match_head(source_of("cat", "dog", "eel"), 3, [names[place] for place in order], "dir")
    assert labels_of(source) == [order.index(place) for place in range(3)]
    assert source.class_names == tuple(names[place] for place in order)
    assert source.scored is None
    synsets = [*SYNSETS[1:], SYNSETS[0]]
    assert labels_of(match_head(source_of(*SYNSETS), 1000, synsets, "dir")) == [999, *range(999)]


def test_a_class_without_images_may_be_an_empty_folder():
    source = match_head(source_of("a", "c", empty=("b", "junk")), 3, [*"abc"], "dir")
    assert labels_of(source) == [0, 2]
    assert (source.class_names, source.scored) == (("a", "b", "c"), None)  # a prediction of b is wrong
    # The same for ImageNet's classes.
    source = match_head(source_of(*SYNSETS[1:], empty=(SYNSETS[0],)), 1000, None, "dir")
    assert (labels_of(source)[0], source.scored) == (1, None)


@pytest.mark.parametrize(
    ("names", "orders"),
    [
        (["c1", "c2", "c10"], {"imagefolder": ["c1", "c10", "c2"], "timm": ["c1", "c2", "c10"]}),
        (["Cat", "ant", "bee"], {"imagefolder": ["Cat", "ant", "bee"], "timm": ["ant", "bee", "Cat"]}),
        (
            ["0", "1", "2", "10"],
            {"imagefolder": ["0", "1", "10", "2"], "timm": ["0", "1", "2", "10"], "numeric": ["0", "1", "2", "10"]},
        ),
        (
            ["0.25", "0.5", "10"],
            {
                "imagefolder": ["0.25", "0.5", "10"],
                "timm": ["0.5", "0.25", "10"],
                "numeric": ["0.25", "0.5", "10"],
            },
        ),
        (
            ["-10", "-5", "3"],
            {"imagefolder": ["-10", "-5", "3"], "timm": ["3", "-5", "-10"], "numeric": ["-10", "-5", "3"]},
        ),
        (["b", "a", "c"], {"imagefolder": ["a", "b", "c"], "timm": ["a", "b", "c"], "dataset": ["b", "a", "c"]}),
    ],
)
def test_a_head_without_names_stops_where_usual_orders_differ(names, orders):
    source = source_of(*names)
    with pytest.raises(UnknownOrder) as caught:
        match_head(source, len(names), None, "dir")
    assert "\n" not in str(caught.value)
    for name in orders:
        assert name in str(caught.value)
    for name, order in orders.items():  # as stated, here or in the checkpoint
        matched = match_head(source, len(names), name, "dir")
        assert matched.class_names == tuple(order)
        assert [order[label] for label in labels_of(matched)] == names
    # Names settle it, in any order.
    assert labels_of(match_head(source, len(names), names[::-1], "dir")) == [*range(len(names))][::-1]


def test_the_orders_are_those_of_the_libraries(tmp_path):
    timm = pytest.importorskip("timm.data.readers.reader_image_folder")
    names = ["c1", "C2", "c10", "10", "9", "-3", "x 5.25", "x 5.5", "ant", "Bee"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"pixels")
    source = open_source(f"folder:{tmp_path}")
    _, outputs = timm.find_images_and_targets(str(tmp_path))
    assert match_head(source, 10, "timm", "dir").class_names == tuple(sorted(outputs, key=outputs.get))
    folder = pytest.importorskip("torchvision.datasets.folder")
    assert match_head(source, 10, "imagefolder", "dir").class_names == tuple(folder.find_classes(tmp_path)[0])


@pytest.mark.parametrize(
    "names",
    [
        WORDS,
        [f"{index:04d}" for index in range(1, 1001)],
        [*map(str, range(1, 1001))],
        [f"n{i:08d}" for i in range(1000)],
    ],
    ids=["words", "from 0001", "from 1", "other synsets"],
)
def test_a_thousand_outputs_without_names_are_not_taken_for_a_thousand_folders(names):
    source = source_of(*sorted(names))
    with pytest.raises(UnknownOrder, match="are not named as ImageNet's") as caught:
        match_head(source, 1000, None, "dir")
    assert "\n" not in str(caught.value)
    assert match_head(source, 1000, "imagefolder", "dir").class_names == tuple(sorted(names))
    assert labels_of(match_head(source, 1000, names, "dir")) == [names.index(name) for name in sorted(names)]


@pytest.mark.parametrize("order", ["timm", "numeric"])
def test_an_order_leaves_imagenets_own_classes_alone(order):
    assert match_head(source_of(*IMAGENETTE), 1000, order, "dir").scored is not None
    assert labels_of(match_head(source_of(*map(str, range(1000))), 1000, order, "dir")) == [*range(1000)]


def test_class_names_are_a_file_a_list_or_an_order(tmp_path):
    (tmp_path / "names.txt").write_text("b\n\n a \n")
    assert read_class_names(tmp_path / "names.txt", 2) == ("b", "a")
    assert read_class_names(["b", "a"], 2) == ("b", "a")
    assert read_class_names("timm", 2) == "timm"
    for asked, message in (
        (tmp_path / "none", "none cannot be read as text: .*; it is a file, or one of timm, imagefolder, numeric"),
        (tmp_path / "names.txt", "has 2 different names, one a line; the head has 3"),
        (["a", "a", "b"], "class_names has 2 different names"),
    ):
        with pytest.raises(InputError, match=message):
            read_class_names(asked, 3)


@pytest.mark.parametrize(
    ("source", "head", "message"),
    [
        (source_of("a"), (0, None), "dir has no head: it gives features, not classes"),
        (source_of("a", "b"), (3, None), "set:x has 2 classes, the head of dir has 3"),
        (
            source_of(*"ab"),
            (2, ["a", "c"]),
            "set:x has class 'b' where dir has 'c': its labels mean other classes (only the data",
        ),
        (source_of(*"ab"), (3, [*"abc"]), "set:x has 2 classes, the head of dir has 3 (only the head has c"),
        (source_of(*"ab", empty=("d",)), (3, [*"abc"]), "the head of dir has 3 (only the head has c; a class without"),
        (source_of(*"abc"), (2, [*"ab"]), "set:x has 3 classes, the head of dir has 2 (only the data set has c"),
        (source_of(*"ab"), (3, [*"aba"]), "two outputs are a"),
        (source_of(*"ab", empty=("c",)), (3, None), "has 2 classes with images, beside empty folders (c), the head of"),
        (source_of(*"ab"), (3, "timm"), "set:x has 2 classes, the head of dir has 3"),
        (source_of(*"ab"), (2, "numeric"), "class_names is numeric, and class 'a' is not a number"),
        # Ten of ImageNet's classes under a head of ten others.
        (source_of(*IMAGENETTE), (10, WORDS[:10]), "has class 'n01440764' where dir has 'thing 0'"),
        # A head of a thousand outputs that is not in ImageNet's order.
        (source_of(*IMAGENETTE), (1000, [*SYNSETS[1:], SYNSETS[0]]), "has 10 classes, the head of dir has 1000"),
        # A thousand folders, one of them astray.
        (source_of(*SYNSETS[:999], "lost+found"), (1000, None), "has class 'lost+found' beside ImageNet's"),
        (source_of("n00000000", *SYNSETS[1:]), (1000, WORDS), "'n00000000' beside ImageNet's: it is none of the 1,000"),
        # ImageNet's development kit counts from 1, in another order.
        (source_of(*map(str, range(1, 1001))), (1000, WORDS), "has class '1' where dir has 'thing 0'"),
        (source_of(*map(str, range(10))), (1000, None), "has 10 classes, the head of dir has 1000"),
        (
            source_of(*(f"n{i:08d}" for i in range(1000))),
            (1000, WORDS),
            "has class 'n00000000' where dir has 'thing 0': its labels",
        ),
    ],
)
def test_other_classes_are_refused_in_one_line(source, head, message):
    num_classes, class_names = head
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        match_head(source, num_classes, class_names, "dir")
    assert "\n" not in str(caught.value)


# ReaL


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def validation(count: int = 4, folder: str = "") -> Source:
    names = [f"{folder}ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(count)]
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (5, 6, 7)).save(buffer, "PNG")
    return Source("set:val", SYNSETS, count, lambda i: Record(buffer.getvalue(), i, names[i]))


@pytest.mark.parametrize("folder", ["", "n01440764/"])
def test_real_labels_go_by_the_files_names(tmp_path, folder):
    path = write_json(tmp_path / "real.json", [[], [970, 795], [230], [1, 2, 3], [4]])
    source = real_labels(validation(4, folder), path)
    assert labels_of(source) == [(), (970, 795), (230,), (1, 2, 3)]
    assert source.labels_per_image == 3
    assert source.scored is None
    assert labels_of(match_head(source, 1000, WORDS, "dir")) == labels_of(source)


def test_real_labels_do_not_depend_on_folders(tmp_path):
    """All validation images in one folder, as in the archive."""
    (tmp_path / "val" / "all").mkdir(parents=True)
    for i in (1, 3):
        (tmp_path / "val" / "all" / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(b"pixels")
    source = open_source(f"folder:{tmp_path / 'val'}")
    source = real_labels(source, write_json(tmp_path / "real.json", [[7], [8], [9]]))
    assert labels_of(match_head(source, 1000, None, "dir")) == [(7,), (9,)]


def test_timms_copy_is_read(tmp_path):
    timm = importlib.util.find_spec("timm")
    if not timm or not timm.origin:
        pytest.skip("timm is absent, which carries real.json")
    path = Path(timm.origin).parent / "data" / "_info" / "imagenet_real_labels.json"
    labels = labels_of(real_labels(validation(50_000), path))
    assert sum(label != () for label in labels) == 46_837
    assert labels[:3] == [(), (970, 795), (230, 231)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1]}, "is not ReaL's real.json: a list of lists"),
        ([1, 2], "is not ReaL's real.json"),
        ([], "is not ReaL's real.json"),
        ([[1], [1000]], "integers from 0 to 999"),
        ([[1], ["2"]], "integers from 0 to 999"),
        ([[1]] * 3, "ILSVRC2012_val_00000004.JPEG is none of the 3 of"),
    ],
)
def test_other_files_are_not_taken_for_real_labels(tmp_path, value, message):
    path = write_json(tmp_path / "real.json", value)
    with pytest.raises(InputError, match=message) as caught:
        labels_of(real_labels(validation(), path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_real_labels_errors_at_once(tmp_path):
    path = write_json(tmp_path / "real.json", [[1]])
    with pytest.raises(InputError, match=r"image 0 is none of the 1 of .*real\.json, which are named ILSVRC2012_val_0"):
        real_labels(source_of(*SYNSETS), path)
    with pytest.raises(InputError, match="absent cannot be read: No such file"):
        real_labels(validation(), tmp_path / "absent")
    path.write_text("<html>")
    with pytest.raises(InputError, match="is not ReaL's real"):
        real_labels(validation(), path)


def test_batches_of_several_labels(tmp_path):
    source = real_labels(validation(5), write_json(tmp_path / "real.json", [[1], [], [2, 3, 4], [5], []]))
    first, second = eval_batches(source, Preprocess((4, 6), 1.0), 4)
    assert first.labels.dtype == np.int32
    assert first.labels.tolist() == [[1, -1, -1], [-1, -1, -1], [2, 3, 4], [5, -1, -1]]
    assert first.mask.tolist() == [True, False, True, True]
    assert first.names == tuple(f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3, 4))  # not counted, but not padding
    assert second.labels.tolist() == [[-1, -1, -1]] * 4
    assert not second.mask.any()
    assert second.names == ("ILSVRC2012_val_00000005.JPEG", "", "", "")
    with pytest.raises(
        InputError, match="set:val has several labels per image: it can be evaluated on, not trained on"
    ):
        train_batches(source, lambda image, rng: np.zeros((4, 6, 3), np.uint8), (4, 6), 2, range(1), 0)
