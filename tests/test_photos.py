"Streams of photographs: every kind of image, size and source, the same tensors whether decoded once or late, and one sentence for what is wrong."
import io, json, warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader

from treelora.cli import main
from treelora.engine.ahead import check_still
from treelora.experiments.campaigns import shortened
from treelora.learner import run
from treelora.learning import photos as P
from treelora.streams import ImageSet, get_stream

NAMES = sorted(c for group in P.SUPERCLASSES.values() for c in group)  # CIFAR-100's, in the official order


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def noise(rng, size=(8, 8), mode="RGB"):
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


def write_parquet(folder, names=NAMES, train=3, test=2, size=(8, 8), named=True, rng=None, image="image", label="label"):
    "Both splits; `train` and `test` are images per class, or a list of them."
    rng = rng or np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", train), ("test", test)):
        counts = n if isinstance(n, list) else [n] * len(names)
        rows = [(c, encoded(noise(rng, size))) for c, k in enumerate(counts) for _ in range(k)]
        table = pa.table({image: [{"bytes": x, "path": None} for _, x in rows], label: [c for c, _ in rows]})
        said = {"huggingface": json.dumps({"info": {"features": {label: {"names": list(names)}}}})}
        pq.write_table(table.replace_schema_metadata(said if named else {}), folder / f"{split}-00000-of-00001.parquet")
    return folder


def birds(folder, n=4, **more): return write_parquet(folder / "cub200", [f"{i:03d}.Bird" for i in range(n)], **more)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_parquet(folder / "cifar100")
    return folder


def test_twenty_superclasses_have_each_class_once():
    classes = [c for group in P.SUPERCLASSES.values() for c in group]
    assert len(P.SUPERCLASSES) == 20 and {len(g) for g in P.SUPERCLASSES.values()} == {5} and len(set(classes)) == 100
    assert classes == [c.lower() for c in classes] and NAMES[0] == "apple" and NAMES[-1] == "worm"


def test_plain_and_superclass_stream(root):
    plain, pure = get_stream("split-cifar100", "small", 0, root), get_stream("split-cifar100:superclass", "small", 0, root)
    assert [len(t.classes) for t in plain] == [10] * 10 and [len(t.classes) for t in pure] == [5] * 20
    for stream in (plain, pure):
        assert [c for t in stream for c in t.classes] == list(range(100)) and stream.shape == (3, 70, 70)
        assert sorted(n for t in stream for n in t.class_names) == NAMES
        assert all(len(t.train) == 3 * len(t.classes) and len(t.test) == 2 * len(t.classes) for t in stream)
    for task in pure: assert task.class_names == P.SUPERCLASSES[task.name.removeprefix("cifar100-")]
    assert {t.name for t in pure} == {f"cifar100-{name}" for name in P.SUPERCLASSES}


def test_images_keep_their_class(root):
    table = pq.read_table(root / "cifar100" / "train-00000-of-00001.parquet").to_pylist()
    stream = get_stream("split-cifar100:pixels=32", "small", 3, root)
    for task in list(stream)[:2]:
        for c, name in zip(task.classes, task.class_names):
            own = [P._square(r["image"]["bytes"], 32, "") for r in table if NAMES[r["label"]] == name]
            assert torch.equal(task.train.images[task.train.labels == c], torch.from_numpy(np.stack(own)).float() / 255)


def test_seed_draws_the_order_and_the_images(root):
    of = lambda seed, **options: get_stream("split-cifar100", "small", seed, root, superclass=True, **options)
    assert [t.name for t in of(0)] != [t.name for t in of(1)] and of(0).sha256 == of(0).sha256 != of(1).sha256
    drawn = [set(of(s, train_per_class=1)["cifar100-fish"].train.rows.tolist()) for s in range(2)]
    assert len(drawn[0]) == 5
    assert {s for x in of(0, train_per_class=1) for s in (x.train.sha256[i] for i in x.train.rows)} != {
        s for x in of(1, train_per_class=1) for s in (x.train.sha256[i] for i in x.train.rows)}


def test_names_may_be_missing_from_the_file(tmp_path, root):
    write_parquet(tmp_path, named=False)
    unnamed = get_stream("split-cifar100:superclass", "small", 0, tmp_path)
    whole = get_stream("split-cifar100:superclass", "small", 0, root)
    assert unnamed.sha256 == whole.sha256  # official labels are in the order of the names


def test_foreign_classes_have_no_superclass(tmp_path):
    write_parquet(tmp_path, ["apple", "unicorn"])
    with pytest.raises(ValueError, match="'unicorn' is in no superclass"): get_stream("split-cifar100:superclass", "small", 0, tmp_path)
    assert len(get_stream("split-cifar100", "small", 0, write_parquet(tmp_path, NAMES[:7]))) == 1


def test_scales_and_sizes(tmp_path):
    birds(tmp_path, train=[30, 22, 25, 19], test=11)
    sizes = lambda scale, **options: [len(d) for t in get_stream("split-cub200", scale, 0, tmp_path, **options) for d in (t.train, t.test)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scale says at most: nobody asked for more than there is
        assert sizes("quick") == [79, 40] and sizes("small") == sizes("paper") == [96, 44]
    assert sizes("quick", test_per_class=3) == [79, 12]
    with pytest.warns(UserWarning, match="split-cub200, training: 2 of 4 classes have fewer than 24 images .the smallest has 19."):
        assert sizes("paper", train_per_class=24) == [24 + 22 + 24 + 19, 44]
    about = get_stream("split-cub200:pixels=16,keep=8", "quick", 0, tmp_path).about
    assert about == "4 classes, 19 to 20 training and 10 test images per class, kept at 8 and handed out at 16 pixels"


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("RGB", "JPEG")])
def test_all_kinds_of_images_become_colours(mode, kind):
    image = noise(np.random.default_rng(0), (9, 9), mode)
    found = P._square(encoded(image, kind), 9, "")
    assert found.shape == (3, 9, 9) and found.dtype == np.uint8
    if kind != "JPEG": assert (found == np.asarray(image.convert("RGB")).transpose(2, 0, 1)).all()
    else: assert np.abs(found.astype(int) - np.asarray(image.convert("RGB")).transpose(2, 0, 1)).mean() < 60


def test_sixteen_bits_are_refused(tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(2): Image.new("I;16", (8, 8)).save(folder / f"{i}.png")
    with pytest.raises(ValueError, match="png cannot be read as an image: it has more than eight bits"): get_stream("split-imagenet-r", "small", 0, tmp_path)


def test_folders_give_the_same_stream_as_parquet(tmp_path):
    names = [f"{i:03d}.Bird" for i in range(3)]
    write_parquet(tmp_path / "cub200", names)
    for split in ("train", "test"):
        rows = pq.read_table(tmp_path / "cub200" / f"{split}-00000-of-00001.parquet").to_pylist()
        for i, row in enumerate(rows):
            folder = tmp_path / "folders" / split / names[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:03d}.png").write_bytes(row["image"]["bytes"])
    a, b = (get_stream("split-cub200", "small", 0, tmp_path / where) for where in ("cub200", "folders"))
    assert a.sha256 == b.sha256 and [t.class_names for t in a] == [t.class_names for t in b]


def test_one_folder_of_classes_is_cut_in_two(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("n01", "n02"):
        (tmp_path / "imagenet-r" / name).mkdir(parents=True)
        for i in range(10): noise(rng, (9 + i, 8)).save(tmp_path / "imagenet-r" / name / f"{i}.jpg")
    streams = [get_stream("split-imagenet-r:keep=8,pixels=12", "small", seed, tmp_path) for seed in (0, 1)]
    assert [(len(t.train), len(t.test)) for t in streams[0]] == [(16, 4)] and streams[0].shape == (3, 12, 12)
    held = [{d.sha256[i] for i in d.rows} for d in (s[0].test for s in streams)]
    assert held[0] == held[1]  # the same photographs are for testing, whatever the seed


def test_the_hash_is_that_of_what_was_used(tmp_path):
    hashes = set()
    for change in range(3):
        rng = np.random.default_rng(change == 1)
        birds(tmp_path, rng=rng)
        if change == 2:  # one bit of one pixel of one image
            file = tmp_path / "cub200" / "train-00000-of-00001.parquet"
            rows = pq.read_table(file).to_pylist()
            pixels = np.asarray(Image.open(io.BytesIO(rows[0]["image"]["bytes"]))).copy()
            pixels[0, 0, 0] ^= 1
            rows[0]["image"]["bytes"] = encoded(Image.fromarray(pixels))
            pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(pq.read_schema(file).metadata), file)
        hashes.add(get_stream("split-cub200", "small", 0, tmp_path).sha256)
    birds(tmp_path)
    hashes |= {get_stream(f"split-cub200{more}", "small", 0, tmp_path).sha256 for more in ("", ":pixels=16", ":keep=8", ":train_per_class=1")}
    assert len(hashes) == 6


def test_late_decoding_gives_the_same_tensors(tmp_path):
    birds(tmp_path, size=(11, 8))
    early = get_stream("split-cub200:flips,crops=0.5", "small", 0, tmp_path)
    with pytest.warns(UserWarning, match="would take 0.000553 GB, more than 0.0001 GB; they are decoded in each batch"):
        late = get_stream("split-cub200:flips,crops=0.5", "small", 0, tmp_path, memory=1e-4)
    assert isinstance(late[0].train.kept, P.Encoded) and isinstance(early[0].train.kept, torch.Tensor)
    assert early.sha256 == late.sha256 and early.name == late.name and early.about == late.about
    for split in ("train", "test"):
        for a, b in zip(early.loader(0, split, 5, seed=1), late.loader(0, split, 5, seed=1)): assert all(map(torch.equal, a, b))


def test_batches_are_the_images_one_by_one(root):
    stream = get_stream("split-cifar100", "small", 0, root)
    data = stream[0].test
    images, labels = next(iter(DataLoader(data, len(data))))
    assert torch.equal(labels, data.labels) and images.shape == (20, 3, 70, 70)
    for i in (0, 7, 19): torch.testing.assert_close(data[i][0], images[i], atol=0.005, rtol=0)  # one step of 255
    assert torch.equal(data.images[torch.tensor([3, 4])], data[3:5][0]) and data.images.shape == images.shape
    both = torch.cat([y for _, y in stream.loader([0, 1], "test", 7)])
    assert both.tolist() == stream[0].test.labels.tolist() + stream[1].test.labels.tolist()


def test_bytes_and_floats_are_scaled_alike():
    x = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = P.to_pixels(x)
    assert torch.equal(plain, x.float() / 255)
    for side in (4, 20):  # bytes are rounded to bytes
        torch.testing.assert_close(P.to_pixels(plain, side), P.to_pixels(x, side), atol=0.005, rtol=0)
    assert P.to_pixels(x, 4).shape == (2, 3, 4, 4)


def test_training_images_change_and_test_images_do_not(root):
    stream = get_stream("split-cifar100", "small", 0, root, flips=True, crops=0.6)
    plain = get_stream("split-cifar100", "small", 0, root)
    loader = stream.loader(0, "train", 30, seed=5)
    one, two = (next(iter(loader)) for _ in range(2))
    again = next(iter(stream.loader(0, "train", 30, seed=5)))
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0].sum((1, 2, 3)).sort()[0], two[0].sum((1, 2, 3)).sort()[0])
    assert one[0].min() >= 0 and one[0].max() <= 1
    for a, b in zip(stream.loader(0, "test"), plain.loader(0, "test")): assert all(map(torch.equal, a, b))
    assert stream.sha256 == plain.sha256 and stream.name == "split-cifar100:flips,crops=0.6"
    check_still(plain.loader(0).dataset)
    with pytest.raises(ValueError, match="augmented"): check_still(loader.dataset)


def test_flips_are_exact(root):
    stream = get_stream("split-cifar100:flips", "small", 0, root)
    images, labels = next(iter(stream.loader(0, "train", 30, seed=0)))
    seen = stream[0].train.images[:]
    near = lambda x: any(torch.allclose(x, y, atol=0.005) for y in seen)
    kinds = [(near(x), near(x.flip(-1))) for x in images]
    assert set(kinds) == {(True, False), (False, True)}


def test_cache_is_used_and_checked(tmp_path, monkeypatch):
    birds(tmp_path)
    shelf = tmp_path / "shelf"
    first = get_stream("split-cub200", "small", 0, tmp_path, cache=shelf)
    file, = shelf.iterdir()
    monkeypatch.setattr(P, "decoded", None)
    monkeypatch.setenv("TREELORA_CACHE", str(shelf))
    again = get_stream("split-cub200", "small", 0, tmp_path)
    assert torch.equal(first[0].train.kept, again[0].train.kept) and first.sha256 == again.sha256
    with pytest.raises(TypeError): get_stream("split-cub200:keep=8", "small", 0, tmp_path)  # other sizes are other files
    for damage in (lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:40], lambda b: b""):
        file.write_bytes(damage(file.read_bytes()))
        monkeypatch.undo()
        found = get_stream("split-cub200", "small", 0, tmp_path, cache=shelf)
        assert torch.equal(found[0].train.kept, first[0].train.kept)
        monkeypatch.setattr(P, "decoded", None)
        get_stream("split-cub200", "small", 0, tmp_path, cache=shelf)  # written again


@pytest.mark.parametrize("argument, words", [
    ("size=3", "has no option 'size'; it has superclass, train_per_class"), ("superclass", "has no superclasses"), ("pixels=0", "pixels"), ("pixels=big", "pixels='big'"),
    ("train_per_class=1.5", "train_per_class=1.5"), ("crops=0", "between 0 and 1"), ("crops=yes", "crops='yes'"), ("flips=1", "flips=1 must be True or False"), ("memory=-1", "memory"), (",", "no option ''")])
def test_wrong_options(tmp_path, argument, words):
    with pytest.raises(ValueError, match=words): get_stream(f"split-cub200:{argument}", "small", 0, tmp_path)


def test_what_is_wrong_with_the_data(tmp_path, monkeypatch, capsys):
    def no_network(*a): raise ConnectionError("no network")
    monkeypatch.setattr("datasets.load_dataset", no_network)
    monkeypatch.delenv("TREELORA_DATA", raising=False)
    for name in P.SETS:
        with pytest.raises(FileNotFoundError, match="hub said: ConnectionError"): get_stream(name, "small")
        with pytest.raises(FileNotFoundError, match=f"{name} was not found in .*nowhere"): get_stream(name, "small", root=tmp_path / "nowhere")
    write_parquet(tmp_path / "a", ["x"], image="picture")
    with pytest.raises(ValueError, match="has the columns picture, label; one must be called image or img"): get_stream("split-cub200", "small", 0, tmp_path / "a")
    write_parquet(tmp_path / "b", ["x"], label="class")
    assert main(["run", "--stream", "split-cub200", "--scale", "small", "--root", str(tmp_path / "b")]) == 2
    assert "has the columns image, class; one must be called label" in capsys.readouterr().err
    pq.write_table(pa.table({"image": [{"bytes": b"no image"}, {"bytes": None}], "label": [0, 0]}), write_parquet(tmp_path / "c", ["x"]) / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="Image 1 of .*c cannot be read as an image: it holds no encoded bytes"): get_stream("split-cub200", "small", 0, tmp_path / "c")
    with pytest.raises(ValueError, match="Image 0 of .*c cannot be read as an image: cannot identify"): get_stream("split-cub200:train_per_class=1", "small", 2, _without_last(tmp_path / "c"))
    write_parquet(tmp_path / "d", ["x", "y"], train=[1, 0])
    with pytest.raises(ValueError, match="labels .* that no training image has"): get_stream("split-cub200", "small", 0, tmp_path / "d")
    with pytest.raises(ValueError, match="takes no options, but was given pixels"): get_stream("split-digits", pixels=3)


def _without_last(folder):
    file = folder / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).slice(0, 1), file)
    return folder


def test_the_hub_by_another_name(monkeypatch):
    "What the hub gives: other columns, one split alone, and Tiny ImageNet's other half."
    from datasets import ClassLabel, Dataset, Features, Image as Encoded, Value
    monkeypatch.delenv("TREELORA_DATA", raising=False)
    def given(labels, column, kind):
        rows = {"image": [{"bytes": encoded(noise(np.random.default_rng(i))), "path": None} for i in range(len(labels))], column: labels}
        return Dataset.from_dict(rows, Features({"image": Encoded(), column: kind}))
    monkeypatch.setattr("datasets.load_dataset", lambda name: {"test": given(["n2", "n1"] * 5, "wnid", Value("string"))})
    art = get_stream("split-imagenet-r", "small")
    assert [sorted(t.class_names) for t in art] == [["n1", "n2"]] and (len(art[0].train), len(art[0].test)) == (8, 2)
    wnids = [f"n{i}" for i in range(4)]
    tiny = {split: given(list(range(4)) * 2, "label", ClassLabel(names=wnids)) for split in ("train", "valid")}
    monkeypatch.setattr("datasets.load_dataset", lambda name: tiny)
    assert set(get_stream("split-tiny-imagenet", "small")[0].class_names) == set(P.tiny_imagenet_halves(wnids)[1])
    coarse = {s: given([0, 1], "fine_label", ClassLabel(names=["apple", "bear"])) for s in ("train", "test")}
    monkeypatch.setattr("datasets.load_dataset", lambda name: coarse)
    assert len(get_stream("split-cifar100:superclass", "small")) == 2


def test_tiny_imagenet_lies_in_its_half(tmp_path):
    write_parquet(tmp_path / "tiny-imagenet" / "stream", [f"n{i:02d}" for i in range(20)])
    for root in (tmp_path, tmp_path / "tiny-imagenet", tmp_path / "tiny-imagenet" / "stream"):
        stream = get_stream("split-tiny-imagenet", "small", 0, root)
        assert (len(stream), stream.image_size, stream[0].name) == (2, 64, "tiny-imagenet-01")


def test_a_run_and_a_short_one(tmp_path):
    birds(tmp_path)
    stream = get_stream("split-cub200:pixels=8,keep=8,flips,crops=0.7", "small", 0, tmp_path)
    vit = lambda: VisionTransformer(img_size=8, patch_size=4, in_chans=3, num_classes=4, embed_dim=16, depth=5, num_heads=2)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(run(stream, "treelora", "small", model=vit(), epochs=1, batch_size=4, lr=0.01, progress=False))
    assert (results[0].R == results[1].R).all() and results[0].config["stream"] == stream.name
    torch.manual_seed(0)
    assert run(stream, "joint", "small", model=vit(), epochs=1, batch_size=4, progress=False).op >= 0
    few = shortened(stream, 3, 2, 1)
    assert isinstance(few[0].train, ImageSet) and len(few[0].train) == 3 and few[0].train.images.shape == (3, 3, 8, 8)
    assert next(iter(few.loader(0)))[0].shape == (3, 3, 8, 8)
