"A state of any tensors, and files that are there as a whole or not at all."
import pytest
import torch

from treelora.engine.files import DTYPES, FORMAT, read_state, replace_file, write_state


def test_tensors_of_every_type_and_shape_come_back(tmp_path):
    torch.manual_seed(0)
    tensors = {f"{dtype} {shape}": (4 * torch.rand(shape)).to(dtype) for dtype in DTYPES for shape in ((), (0,), (3,), (2, 5))}
    tensors["a view"] = torch.arange(12.0).view(3, 4).T[1:]
    write_state(tmp_path, {"format": FORMAT, "note": "x"}, tensors, stem="task")
    plain, found = read_state(tmp_path)
    assert plain["note"] == "x" and found.keys() == tensors.keys()
    assert all(found[k].dtype == x.dtype and torch.equal(found[k], x) for k, x in tensors.items())


def test_an_older_state_goes_when_the_new_one_is_there(tmp_path):
    for value in (1.0, 2.0): write_state(tmp_path, {"format": FORMAT}, {"x": torch.tensor([value])})
    assert len(list(tmp_path.iterdir())) == 2 and read_state(tmp_path)[1]["x"].item() == 2


@pytest.mark.parametrize("data", [b"new", [b"n", b"ew"]])
def test_a_file_is_replaced_as_a_whole(tmp_path, data):
    file = tmp_path / "a" / "b.json"
    assert replace_file(file, b"old") == file and replace_file(str(file), data).read_bytes() == b"new"
    assert [p.name for p in file.parent.iterdir()] == ["b.json"]
    with pytest.raises(OSError, match="could not be written .* what was there before is untouched"): replace_file(file / "c", b"x")
    assert file.read_bytes() == b"new"
