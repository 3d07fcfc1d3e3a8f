"Shared settings: one thread unless OMP_NUM_THREADS says otherwise, deterministic hypothesis, and the small things that several test files need."
import os
from copy import deepcopy
from functools import cache

import pytest
import torch
from hypothesis import settings
from torch import nn

from treelora.lora import add_lora

settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True)
settings.load_profile("ci")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


@pytest.fixture
def make_net():
    "A factory of equal small networks with two LoRA layers of different sizes."
    def make(seed=1):
        torch.manual_seed(seed)
        return add_lora(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), ["0", "2"], r=2, alpha=2)
    return make


@pytest.fixture(scope="session")
def letters():
    "A tokenizer of single characters."
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    from transformers import PreTrainedTokenizerFast
    vocabulary = ["<end>", *map(chr, range(32, 127)), "\n"]
    tokens = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token=" "))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>")


@pytest.fixture(scope="session")
def tiny_llama(letters):
    "A factory of tiny, untrained language models, one a seed in the whole session: copy it before it changes."
    from transformers import LlamaConfig, LlamaForCausalLM

    @cache
    def make(seed):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                            max_position_embeddings=512, pad_token_id=0, eos_token_id=0, bos_token_id=None))
    return make


@pytest.fixture
def tiny_language(tiny_llama, letters):
    "A factory of equal, tiny, untrained language models with a tokenizer of single characters."
    def make(seed=0):
        model = deepcopy(tiny_llama(seed))
        torch.manual_seed(seed + 1)
        return model, deepcopy(letters)
    return make
