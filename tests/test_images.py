"Streams of one's own images: every partition, size and layout, and one sentence for what does not fit."
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image as Encoded
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from treelora.cli import main
from treelora.learner import run
from treelora.learning.images import image_stream
from treelora.streams import TaskStream, get_stream


def cut(per_task, classes=11, **more):
    y = torch.arange(classes)
    x = torch.rand(classes, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return TaskStream.from_arrays("cut", x, y, x, y, per_task, **{"class_order": range(classes)} | more)


@pytest.mark.parametrize("per_task, sizes", [(10, [10, 1]), (11, [11]), (3, [3, 3, 3, 2]), ([7, 2, 2], [7, 2, 2])])
def test_numbers_of_classes(per_task, sizes):
    stream = cut(per_task)
    assert [len(t.classes) for t in stream] == sizes and [c for t in stream for c in t.classes] == list(range(11))
    assert [t.train.labels.tolist() for t in stream] == [list(t.classes) for t in stream]


def test_classes_that_are_named_stand_together():
    stream = cut([[3, 1], [0, 2]], classes=4, class_order=None, class_names={0: "a", 1: "b", 2: "c", 3: "d"})
    whole = cut(4, classes=4)
    assert [t.class_names for t in stream] == [("d", "b"), ("a", "c")] and stream.n_classes == 4
    for task in stream:  # an image still carries its own class's name
        for image, label in zip(task.train.images, task.train.labels.tolist()):
            original = next(i for i, other in enumerate(whole[0].train.images) if torch.equal(image, other))
            assert task.class_names[task.classes.index(label)] == "abcd"[original]


@pytest.mark.parametrize("per_task, words", [
    (0, "from 1 to 11"), (12, "from 1 to 11"), (2.5, "from 1 to 11"), (None, "from 1 to 11"), ([5, 5], "add up to 11"), ([11, 0], "positive"), ("11", "a whole number, or a list"),
    ([], "add up to 11"), ([[0, 1], []], "task without classes"), ([[0], [0]], "must list each of the classes"), ([list(range(10)), [12]], "must list each")])
def test_partitions_that_do_not_add_up(per_task, words):
    with pytest.raises(ValueError, match=words): cut(per_task, class_order=None)


def test_large_labels_with_gaps_need_no_table():
    y, x = torch.tensor([5, 7, 10 ** 12]), torch.eye(3)[:, None, None].repeat(1, 1, 3, 1)
    stream = TaskStream.from_arrays("gaps", x, y, x, y, 2, class_order=[10 ** 12, 5, 7])
    assert [t.class_names for t in stream] == [("1000000000000", "5"), ("7",)]
    assert [t.train.labels.tolist() for t in stream] == [[1, 0], [2]]  # images keep their order


def test_wide_images_are_learned():
    x, y = torch.rand(8, 1, 4, 12, generator=torch.Generator().manual_seed(0)), torch.arange(4).repeat(2)
    stream = TaskStream.from_arrays("wide", x, y, x, y, [3, 1])
    vit = VisionTransformer(img_size=(4, 12), patch_size=4, in_chans=1, num_classes=4, embed_dim=16, depth=5, num_heads=2)
    result = run(stream, "treelora", model=vit, epochs=1, batch_size=4, lr=0.01, progress=False)
    assert result.R.shape == (2, 2) and [len(c) for c in result.classes] == [3, 1]
    with pytest.raises(ValueError, match="No model takes 1 x 4 x 12 images"): run(stream, "treelora", progress=False)
    square = VisionTransformer(img_size=4, patch_size=4, in_chans=1, num_classes=4, embed_dim=16, depth=5, num_heads=2)
    with pytest.raises(ValueError, match="1 x 4 x 12 .*takes 1 x 4 x 4"): run(stream, "treelora", model=square, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "ImageFolder's layout: three classes of grey images."
    root = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        for k, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for i in range(3): Image.new("L", (6, 4), 40 * k + i).save(root / split / name / f"{i}.png")
        (root / split / "ant" / "notes.txt").write_text("no image", encoding="utf-8")
    return root


def test_layouts_agree(folder, tmp_path):
    stream = get_stream("images:2,1", root=folder)
    assert stream.shape == (1, 4, 6) and stream.name == "images:2,1" and [len(t.train) for t in stream] == [6, 3]
    rows = {s: sorted((folder / s).rglob("*.png")) for s in ("train", "val")}
    labels = {s: [["ant", "bee", "cat"].index(p.parent.name) for p in files] for s, files in rows.items()}
    kinds = Features({"image": Encoded(), "label": ClassLabel(names=["ant", "bee", "cat"])})
    held = {s: [{"bytes": p.read_bytes(), "path": None} for p in files] for s, files in rows.items()}
    DatasetDict({s: Dataset.from_dict({"image": held[s], "label": labels[s]}, kinds) for s in rows}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    for s in rows: pq.write_table(pa.table({"img": held[s], "labels": [["ant", "bee", "cat"][k] for k in labels[s]]}), tmp_path / "parquet" / "data" / f"{s}-00000.parquet")
    for kind in ("saved", "parquet"): assert get_stream("images:2,1", root=tmp_path / kind).sha256 == stream.sha256
    assert image_stream(folder, 1, size=(8, 4)).shape == (1, 8, 4)
    colour = image_stream(folder / "train", 3)  # no test split: a fifth, at least one, of each class
    assert [len(colour[0].train), len(colour[0].test)] == [6, 3]


def test_one_colour_image_makes_all_three_channels(folder, tmp_path):
    for k, mode in enumerate(("L", "P", "RGBA", "LA")): (tmp_path / "c").mkdir(exist_ok=True), Image.new(mode, (4, 4)).save(tmp_path / "c" / f"{k}.png")
    assert image_stream(tmp_path, 1).shape == (3, 4, 4)


def damaged(folder, tmp_path):
    "What is put wrong, and the words that say so."
    (tmp_path / "train/a").mkdir(parents=True)
    yield "holds no images"
    for name in ("one.png", "two.png"): Image.new("L", (4, 4)).save(tmp_path / "train/a" / name)
    (tmp_path / "train/b").mkdir()
    yield "b holds no images"
    Image.new("L", (4, 4)).save(tmp_path / "train/b/one.png")
    yield "class 'b' of .* has one image"
    Image.new("L", (4, 5)).save(tmp_path / "train/b/two.png")
    yield "has 5 x 4 pixels and the first image 4 x 4"
    Image.new("I;16", (4, 4)).save(tmp_path / "train/b/two.png")
    yield "more than eight bits"
    (tmp_path / "train/b/two.png").write_bytes(b"\x89PNG")
    yield "two.png cannot be read as an image"


def test_folders_that_cannot_be_read(folder, tmp_path):
    for words in damaged(folder, tmp_path):
        with pytest.raises((ValueError, FileNotFoundError), match=words): image_stream(tmp_path, 2)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read"): image_stream(tmp_path, 2)
    for table, words in (({"picture": [b""], "label": [1]}, "image or img"), ({"image": [b""], "label": [None]}, "NoneType"), ({"image": [3], "label": [1]}, "encoded bytes")):
        pq.write_table(pa.table(table), tmp_path / "train-0.parquet")
        pq.write_table(pa.table(table), tmp_path / "test-0.parquet")
        with pytest.raises(ValueError, match=words): image_stream(tmp_path, 1)


@pytest.mark.parametrize("stream, root, words", [("images", False, "from a folder"), ("images:two", True, "should be images:10"), ("images:7", True, "from 1 to 3")])
def test_the_command_line_says_so(folder, tmp_path, capsys, stream, root, words):
    assert main(["run", "--stream", stream, "--results", str(tmp_path / "r"), *(["--root", str(folder)] if root else [])]) == 2
    assert words in capsys.readouterr().err
