"What test_processes.py starts, by name: one process of a run, which writes what it has learned."
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from test_language import tiny_stream as text_stream
from test_learner import tiny_stream, tiny_vit

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from treelora.algorithm import TreeLoRA
from treelora.learner import run
from treelora.lora import add_lora
from treelora.methods import get_method


def small_language():
    "A tiny untrained Llama that reads single characters."
    letters = ["<end>", *map(chr, range(32, 127)), "\n"]
    tokens = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=" "))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=512, pad_token_id=0, eos_token_id=0, bos_token_id=None)
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>")


def keeping(name, kind, die=None):
    "A method's class that can be found after its run; process 1 kills itself after a step of a stage, if asked to."
    class Kept(get_method(name, kind)):
        made = []

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.made.append(self)

        def after_step(self):
            super().after_step()
            if die and os.environ.get("RANK") == "1" and [self.task, self.tl._now.round] == die: os.kill(os.getpid(), signal.SIGKILL)
    Kept.fixed = (*Kept.fixed, "made")
    return Kept


def learned(stream, name, model, die=None, **settings):
    method = keeping(name, stream.kind, die)
    result = run(stream, method, model=model, progress=False, **settings)
    return result, method.made[-1].tl


def vision(n=12, batch_size=8, name="treelora", **settings):
    return learned(tiny_stream(classes=6, n=n), name, tiny_vit(6), **(dict(epochs=2, batch_size=batch_size, lr=0.005) | settings))


def digits(**settings):
    return learned("split-digits", "treelora", None, **(dict(epochs=1) | settings))


def language(name="treelora", **settings):
    return learned(text_stream(), name, small_language(), **(dict(epochs=2, batch_size=4, lr=0.001, dropout=0.0) | settings))


def bare():
    "A loop of one's own, with Accelerate: the batch is 8 in one process, 4 in each of two."
    several = int(os.environ["WORLD_SIZE"]) > 1
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    model = accelerator.prepare(add_lora(net, ["0", "2"], r=2, alpha=2))
    tl = TreeLoRA(accelerator.unwrap_model(model), lam=0.01)
    for k in range(4):
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(k))
        y, optimizer = (x[:, k % 2] > 0).long(), accelerator.prepare(torch.optim.SGD(tl.params, 0.1))
        with tl.task(f"t{k}"):
            for i in range(0, 64, 8):
                own = slice(i + 4 * accelerator.process_index, i + 4 * accelerator.process_index + 4) if several else slice(i, i + 8)
                accelerator.backward(torch.nn.functional.cross_entropy(model(x[own]), y[own]))
                tl.step()
                optimizer.step(), optimizer.zero_grad()
    return None, tl


class OwnWays(get_method("treelora", "vision")):
    "A method that adds something of its own in each process."
    name = "own-ways"

    def after_backward(self, batch, loss):
        super().after_backward(batch, loss)
        for p in self.parameters(): p.grad += float(os.environ["RANK"])


def own_ways(): run(tiny_stream(), OwnWays, model=tiny_vit(), epochs=1, batch_size=8, progress=False)


CASES = {"vision": vision, "vision-tails": lambda **s: vision(n=11, batch_size=7, **s), "digits": digits, "language": language,
         "fresh": lambda **s: vision(signal="fresh", **s), "own-ways": own_ways, "language-branch": lambda **s: language("treelora-branch", **s), "bare": bare}


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, out, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    try: result, tl = CASES[case](**settings)
    except (ValueError, ConnectionError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(3)
    out.mkdir(parents=True, exist_ok=True)
    kept = {"tree": tl.tree.newick(), "groups": [sorted(map(sorted, tl.tree.groups(d))) for d in range(3)], "names": tl.bank.names, "adapters": tl.bank.adapters, "signatures": tl.bank.signatures}
    if result: kept |= {"R": torch.tensor(result.R), "trees": result.trees, "restarts": result.seconds_by_phase.get("restarts"), "routing": result.extra.get("routing")}
    torch.save(kept, out / f"{os.environ.get('RANK', 0)}.pt")
