"Shared settings: one thread, deterministic hypothesis, and the small things that several test files need."
import pytest
import torch
from hypothesis import settings
from torch import nn

from treelora.lora import add_lora

settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True)
settings.load_profile("ci")
torch.set_num_threads(1)


@pytest.fixture
def make_net():
    "A factory of equal small networks with two LoRA layers of different sizes."
    def make(seed=1):
        torch.manual_seed(seed)
        return add_lora(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), ["0", "2"], r=2, alpha=2)
    return make
