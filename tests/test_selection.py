"Methods that choose among earlier adapters on a tiny untrained Llama: routes, mixtures, importance, and what they refuse."
import numpy as np
import pytest
import torch

from test_language import tiny_run, tiny_stream
from treelora.methods.selection import SAPT, HiDeLoRAText, TaSL


@pytest.mark.parametrize("method", [HiDeLoRAText, SAPT, TaSL])
def test_every_method_runs_and_repeats(tiny_language, method):
    first, second = (tiny_run(tiny_language, method) for _ in range(2))
    assert first.R.shape == (3, 3) and not np.isnan(first.R[np.tril_indices(3)]).any()
    assert np.array_equal(first.R, second.R, equal_nan=True)
    assert first.memory["stored_bytes"] > 0 and first.config["kind"] == "language"
    first.as_dict()
