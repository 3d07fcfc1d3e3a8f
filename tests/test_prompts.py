"Prompts: where they are attached, how they are selected, what they keep, and runs of every method on tiny models."
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

from treelora.learning.language import Collator, answer_nll
from treelora.learner import run
from treelora.methods.prompts import (DualPrompt, DualPromptAdaptive, DualPrompts, DualPromptText, EnsemblePrefixes, HiDePrompt, L2P, L2PAdaptive, L2PText, Prefixes,
                                      PromptPool, contrast, majority, uniform,
                                      as_read, attention_layers, noise, prefixed, prepended, shares, text_prefixed)
from treelora.learning.models import features, get_model
from treelora.streams import get_stream
from treelora.learning.text import Example, TextSet, TextStream, TextTask

VISION, LANGUAGE = (L2P, DualPrompt, HiDePrompt), (L2PText, DualPromptText)
CLASSES = [(0, 1), (2, 3), (4, 5)]


def vit(): return get_model("glyph-vit", 6).eval()


def images(n=4, seed=0): return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def texts(n_tasks=2, n=8):
    tasks = []
    for k in range(n_tasks):
        examples = [Example(f"{'abc'[k]}: say {i}.", " " + str(i) * (1 + i % 3)) for i in range(n + 3)]
        tasks.append(TextTask(f"task-{k}", TextSet(examples[:n]), TextSet(examples[n:]), "chrf", 4))
    return TextStream("tiny-text", "quick", 0, tasks)


def explicit(attention, x, prefix):
    "Attention over a prefix, from the formula."
    heads = lambda z: z.unflatten(2, (attention.num_heads, -1))
    q, k, v = attention.qkv(x).chunk(3, 2)
    q, k, v = heads(q), heads(torch.cat([prefix[:, 0], k], 1)), heads(torch.cat([prefix[:, 1], v], 1))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / attention.head_dim ** 0.5).softmax(3)
    return attention.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("P", [1, 20])
def test_prefix_is_keys_and_values_of_the_named_layers_alone(fused, P):
    model, seen = vit().requires_grad_(False), {}
    x, prefix = images(), torch.randn(4, 2, P, 96)
    for block in model.blocks: block.attn.fused_attn = fused
    handles = [block.register_forward_hook(lambda m, args, out, i=i: seen.setdefault(i, []).append((args[0], out))) for i, block in enumerate(model.blocks)]
    model(x)
    with prefixed(model, {1: prefix, 3: prefix}): model(x)
    for handle in handles: handle.remove()
    assert seen[0][0][1].equal(seen[0][1][1]) and not seen[1][0][1].equal(seen[1][1][1])  # nothing changes before the first of them
    for i in (1, 3):
        h = model.blocks[i].norm1(seen[i][0][0])
        wanted = explicit(model.blocks[i].attn, h, prefix)
        with prefixed(model, {i: prefix}): assert torch.allclose(model.blocks[i].attn(h), wanted, atol=1e-5)
    lengths = []
    for block in model.blocks: block.register_forward_hook(lambda m, args, out: lengths.append((args[0].shape[1], out.shape[1])))
    with prefixed(model, {1: prefix, 3: prefix}): model(x)
    assert lengths == [(17, 17)] * 6


def test_prompt_tuning_is_read_by_every_block_and_depends_on_all_prompts():
    model, lengths, prompts = vit(), [], torch.randn(4, 25, 96, requires_grad=True)
    for block in model.blocks: block.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    with prepended(model, prompts): out = model(images())
    out.sum().backward()
    assert lengths == [42] * 6 and prompts.grad.abs().amin((0, 2)).gt(0).all()
    assert not model.blocks[0]._forward_pre_hooks


def test_hooks_are_gone_after_an_error():
    model = vit()
    before = model(images())
    with pytest.raises(RuntimeError):
        with prefixed(model, {0: torch.randn(3, 2, 5, 96)}): model(images(4))  # another number of images
    assert model(images()).equal(before)


@given(st.integers(0, 1000), st.integers(1, 6))
def test_selection_is_the_nearest_keys(seed, top):
    pool = PromptPool(noise(7, 2, 3, seed=seed), 5, top, seed=seed)
    queries = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    by_hand = [sorted(range(7), key=lambda j: -F.cosine_similarity(q, pool.keys[j], dim=0).item())[:top] for q in queries]
    chosen = pool.select(queries)
    assert chosen.tolist() == by_hand
    assert pool(chosen).equal(torch.stack([torch.cat([pool.prompts[j] for j in row]) for row in chosen]))
    by_hand = sum(1 - F.cosine_similarity(q, pool.keys[j], dim=0) for q, row in zip(queries, chosen) for j in row) / 4
    assert torch.allclose(pool.pull(queries, chosen), by_hand, atol=1e-5)
    assert pool.select(1000 * queries).equal(chosen)  # of directions alone


def test_only_chosen_prompts_and_keys_have_a_gradient():
    pool = PromptPool(noise(6, 2, 3), 5, 2)
    queries = torch.randn(1, 5)
    chosen = pool.select(queries)
    (pool(chosen).square().sum() + pool.pull(queries, chosen)).backward()
    for grad in (pool.prompts.grad, pool.keys.grad): assert sorted(grad.flatten(1).any(1).nonzero()[:, 0].tolist()) == sorted(chosen[0].tolist())


def test_used_prompts_come_later_while_training_only():
    pool, queries = PromptPool(noise(4, 1, 3), 5, 1), torch.randn(1, 5)
    first = pool.select(queries)
    pool.used[first] = 1e4
    assert pool.select(queries).equal(first) and not pool.select(queries, training=True).equal(first)


def test_gain_multiplies_what_is_learned_and_not_what_is_there():
    slow, fast = (PromptPool(noise(4, 2, 3), 5, 1, gain=gain) for gain in (1.0, 10.0))
    chosen = torch.tensor([[2]])
    assert torch.allclose(slow(chosen), fast(chosen)) and torch.allclose(10 * fast.prompts, slow.prompts)


def test_a_training_batch_votes_and_a_test_image_chooses_for_itself():
    chosen = torch.tensor([[0, 3], [3, 5], [5, 3], [5, 0], [5, 1]])
    assert sorted(majority(chosen, 7)[0].tolist()) == [3, 5] and (majority(chosen, 7) == majority(chosen, 7)[0]).all()
    voting, single = L2P(vit(), CLASSES, gain=10.0), L2P(vit(), CLASSES, gain=10.0, vote=False)
    x, g = images(40), torch.Generator().manual_seed(0)
    for method in (voting, single):
        method.begin_task([0], "a", 1, 1)
        queries = method.query(x)
        with torch.no_grad(): method.prompts.keys.copy_(queries[:30])  # keys so near that images differ in what they choose
    asked = voting.query(x)
    own = single.choose(asked)
    assert (own != own[0]).any() and torch.equal(single.prompts.select(asked), voting.prompts.select(asked))
    counts = F.one_hot(own, 30).sum((0, 1))
    voted = voting.choose(asked)
    assert (voted == voted[0]).all() and counts[voted[0]].min() >= counts.sort(descending=True).values[4]
    assert voting.taken.sum() == single.taken.sum() == 40 * 5 and (voting.taken > 0).sum() == 5


@pytest.mark.parametrize("gain", [1.0, 10.0])
def test_prompts_and_keys_of_images_start_uniform_whatever_the_gain(gain):
    l2p, dual = L2P(vit(), CLASSES, gain=gain), DualPrompt(vit(), CLASSES, gain=gain)
    starts = [l2p.prompts(torch.arange(30)[:, None]), gain * l2p.prompts.keys, gain * dual.prompts.keys, *(x for given_ in (dual.prompts(torch.arange(3)),) for x in given_.values())]
    for x in starts: assert x.abs().max() <= 1 + 1e-6 and x.abs().max() > 0.95 and 0.5 < x.std() < 0.65
    assert l2p.options | {"pull": 0.1, "gain": gain, "vote": True, "start": "uniform"} == l2p.options
    assert dual.options | {"pull": 1.0, "gain": gain, "start": "uniform"} == dual.options
    assert torch.equal(uniform(3, 2, seed=4), uniform(3, 2, seed=4)) and not torch.equal(uniform(3, 2, seed=4), uniform(3, 2, seed=5))


@pytest.mark.parametrize("cls, plain", [(L2PAdaptive, L2P), (DualPromptAdaptive, DualPrompt)])
def test_class_statistics_change_old_classes_logits_and_are_counted(cls, plain):
    methods = [build(vit(), CLASSES) for build in (cls, plain)]
    for method in methods:
        for task in range(2):
            method.begin_task([task], str(task), 1, 1)
            opt, batches = torch.optim.Adam(method.parameters(), 0.01), [(images(12, 10 * task + i), torch.tensor(CLASSES[task] * 6)) for i in range(2)]
            for batch in batches:
                method.loss(batch).backward()
                opt.step(), opt.zero_grad()
            before = method.model.head.weight.detach().clone()
            method.end_task(batches)
            moved = (method.model.head.weight - before).abs().amax(1) > 1e-3
            assert moved.tolist() == [cls is type(method) and c < 2 * task + 2 for c in range(6)]  # old classes' rows too
    adaptive, other = methods
    F_ = 96
    assert adaptive.stored() == other.stored() | {"class moments": 8 * (F_ * F_ + 4 * F_)} and adaptive.options["tap"] and "tap" not in other.options
    x, y = (torch.cat(part) for part in zip(*batches))
    with torch.no_grad(): seen = adaptive.adapted(x).double()
    for c in CLASSES[1]: assert torch.allclose(adaptive.moments.means[c], seen[y == c].mean(0), atol=1e-4)


def test_a_method_without_features_is_refused():
    from treelora.methods.base import Adaptive, VisionMethod

    class Silent(Adaptive, VisionMethod): name = "silent"

    with pytest.raises(ValueError, match="'silent' does not say what its head sees"): Silent(vit(), CLASSES)


def test_contrast_is_the_cross_entropy_of_finding_oneself():
    g = torch.Generator().manual_seed(0)
    h, centres = torch.randn(4, 5, generator=g), torch.randn(3, 5, generator=g).double()
    M = torch.cat([centres.float(), h])
    S = M @ M.T / 0.8
    assert torch.allclose(contrast(h, centres), (S.logsumexp(1) - S.diagonal()).mean(), atol=1e-6)


def test_hideprompts_loss_has_the_contrast_with_earlier_classes():
    batch, losses = (images(6, 3), torch.tensor([2, 3] * 3)), {}
    for reg in (0.0, 0.1, 0.3):
        method = HiDePrompt(vit(), CLASSES, reg=reg)
        method.begin_task([0], "a", 1, 1)
        method.end_task([(images(12), torch.tensor([0, 1] * 6))])
        method.begin_task([1], "b", 1, 1)
        with torch.no_grad(), method.under(batch[0], 1): seen = features(method.model, batch[0])
        losses[reg] = method.loss(batch).item()
        assert method.options["reg"] == reg and method.options["temperature"] == 0.8
    centres = torch.stack(list(method.parts.adapted.means.values()))
    assert len(centres) == 2 and losses[0.1] - losses[0.0] == pytest.approx(0.1 * contrast(seen, centres).item(), rel=1e-3, abs=1e-6)
    assert losses[0.3] - losses[0.0] == pytest.approx(3 * (losses[0.1] - losses[0.0]), rel=1e-3, abs=1e-6)
    with pytest.raises(ValueError, match="reg=-1 of the contrastive term"): HiDePrompt(vit(), CLASSES, reg=-1)


def test_experts_go_by_task_and_general_prompts_to_all():
    prompts = DualPrompts(Prefixes((0, 1), noise(1, 2, 2, 2, 8)), Prefixes((2, 3, 4), noise(3, 3, 2, 4, 8)), 5)
    given_ = prompts(torch.tensor([2, 0, 2]))
    assert [tuple(given_[i].shape) for i in range(5)] == [(3, 2, 2, 8)] * 2 + [(3, 2, 4, 8)] * 3
    assert given_[0][0].equal(given_[0][1]) and given_[3][0].equal(prompts.expert.table[2, 1]) and given_[3][1].equal(prompts.expert.table[0, 1])
    assert prompts.select(prompts.keys.detach(), 3).tolist() == [0, 1, 2] and prompts.select(prompts.keys.detach(), 2).max() < 2


def test_an_ensemble_is_the_formula():
    sets = EnsemblePrefixes((0, 2), noise(4, 2, 2, 3, 4), lean=0.3)
    for t in range(4):
        wanted = sets.table[t] if t == 0 else 0.7 * sets.table[t] + 0.3 * sets.table[:t].mean(0)
        mixed = sets(torch.tensor([t]))
        assert list(mixed) == [0, 2] and torch.allclose(torch.stack([mixed[0][0], mixed[2][0]]), wanted)


def test_training_leaves_backbone_and_earlier_experts_alone():
    method = DualPrompt(vit(), CLASSES)
    frozen = {n: p.clone() for n, p in method.model.named_parameters() if not n.startswith(("head", "prompts"))}
    method.begin_task([0], "a", 1, 1), method.begin_task([1], "b", 1, 1)
    experts = method.prompts.expert.table.detach().clone()
    opt = torch.optim.Adam(method.parameters(), 0.01)
    for seed in range(3):
        method.loss((images(4, seed), torch.tensor([2, 3, 2, 3]))).backward()
        opt.step(), opt.zero_grad()
    assert all(p.equal(frozen[n]) for n, p in method.model.named_parameters() if n in frozen)
    moved = (method.prompts.expert.table - experts).flatten(1).abs().amax(1)
    assert (moved > 0).tolist() == [False, True, False]
    assert method.query(images()).equal(features(vit(), images()))  # queries know no prompt


def test_hides_moments_are_those_of_the_features_under_its_prompts():
    method = HiDePrompt(vit(), CLASSES)
    with torch.no_grad(): method.prompts.table.mul_(50)
    batches = {t: [(images(12, 10 * t + i), torch.tensor(CLASSES[t] * 6)) for i in range(3)] for t in range(2)}
    rows = {}
    for t in range(2):
        method.begin_task([t], str(t), 1, 1)
        x, y = (torch.cat(part) for part in zip(*batches[t]))
        with torch.no_grad(), prefixed(method.model, method.prompts(torch.full((36,), t))): z = features(method.model, x).double()
        rows |= {c: z[y == c].numpy() for c in CLASSES[t]}
        method.end_task(batches[t])
    moments = method.parts.adapted
    for c, z in rows.items(): assert np.allclose(moments.means[c], z.mean(0), atol=1e-5)
    assert np.allclose(moments.scatter, sum(np.cov(z.T) * (len(z) - 1) for z in rows.values()), atol=1e-2)
    assert torch.allclose(method.parts.identity.stats.means[2], torch.cat([features(method.model, x)[y == 2] for x, y in batches[1]]).double().mean(0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cls", VISION)
def test_vision_runs_and_repeats(cls):
    stream = get_stream("split-digits")
    first, second = (run(stream, cls, epochs=1, progress=False, curves=2) for _ in range(2))
    assert np.array_equal(first.R, second.R, equal_nan=True) and first.R[0, 0] > 0.7 and first.op > 0.3
    assert first.memory["stored_bytes"] == sum(first.memory["stored"].values()) > 0


@pytest.mark.parametrize("cls", LANGUAGE)
def test_language_runs_and_repeats(tiny_language, cls):
    first, second = (run(texts(), cls, model=tiny_language(), epochs=1, batch_size=4, lr=0.01, progress=False, curves=2) for _ in range(2))
    assert first.R.shape == (2, 2) and np.array_equal(first.R, second.R, equal_nan=True)
    assert sorted(first.memory["stored"]) == ["keys", "prompts"] and all(len(c["likelihood"]) for c in first.curves)


@pytest.mark.parametrize("cls", LANGUAGE)
def test_language_prompts_learn_and_the_model_does_not_change(tiny_language, cls):
    model, tokenizer = tiny_language()
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    method = cls(model, tokenizer, 2)
    batch = method.collate([Example(f"a: say {i}.", " 77") for i in range(4)])
    method.begin_task([0], "a", 1, 1)
    opt, before = torch.optim.Adam(method.parameters(), 0.01), method.nll(batch).mean()
    for _ in range(25):
        method.loss(batch).backward()
        opt.step(), opt.zero_grad()
    assert method.nll(batch).mean() < before - 0.1
    assert all(p.equal(frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cls", LANGUAGE)
def test_generation_is_teacher_forcing(tiny_language, cls, implementation):
    model, tokenizer = tiny_language()
    model.set_attn_implementation(implementation)
    method = cls(model, tokenizer, 3)
    method.begin_task([2], "c", 1, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in method.parameters(): p.normal_(std=0.1)
    prompts = ["a", "b: say", "something rather longer"]
    answers = method.predict(prompts, 5)
    assert answers == [method.predict([p], 5)[0] for p in prompts] and any(map(str.strip, answers))  # padding changes nothing
    for p, a in zip(prompts, answers):
        if not a.strip(): continue
        batch = method.collate([Example(p, a)])
        ids = batch["input_ids"][0, -len(a) - 1:-1]
        assert tokenizer.decode(ids) == a and forced_logits(method, batch)[0, -len(a) - 2:-2].argmax(1).equal(ids)


def forced_logits(method, batch):
    "Logits of a whole forward pass under the prompts that a batch selects."
    with torch.no_grad():
        if isinstance(method, L2PText): return method.model(**{k: x for k, x in method.selected(batch).items() if k != "labels"}).logits
        with method.under(method.query(batch)): return method.model(**{k: x for k, x in batch.items() if k != "labels"}).logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cached_decoding_under_a_prefix_equals_the_whole_forward_pass(tiny_language, implementation):
    model = tiny_language()[0].eval()
    model.set_attn_implementation(implementation)
    ids, mask = torch.randint(1, 90, (3, 7), generator=torch.Generator().manual_seed(1)), torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    prefix = {1: torch.randn(3, 2, 4, 16, generator=torch.Generator().manual_seed(2))}
    with torch.no_grad(), text_prefixed(model, prefix):
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        whole = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1)
        logits = model(input_ids=out, attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp(min=0)).logits
        unmasked, all_seen = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logits[..., 0] = float("-inf")  # the end token, which must not come
    assert logits[:, 6:-1].argmax(2).equal(out[:, 7:]) and torch.allclose(unmasked, all_seen, atol=1e-5)


def test_a_prefix_of_what_tokens_leave_is_reading_them(tiny_language):
    model, tokenizer = tiny_language()
    model.eval()
    ids = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), text_prefixed(model, dict(enumerate(as_read(model, ids[:, :5]).unbind(1)))):
        rest = model(input_ids=ids[:, 5:], position_ids=torch.arange(5, 9)[None]).logits
    assert torch.allclose(rest, model(input_ids=ids).logits[:, 5:], atol=1e-5)
    method = DualPromptText(model, tokenizer, 3, lengths=(2, 4))  # and that is where prefixes start
    start = as_read(model, method.random_tokens(3, 4))
    given_ = method.prompts(torch.tensor([2, 0]))
    assert list(given_) == [0, 1] and torch.allclose(given_[1], start[[2, 0], 1], atol=1e-6)


def test_l2ps_vectors_lengthen_what_the_language_model_reads(tiny_language):
    model, tokenizer = tiny_language()
    method, seen = L2PText(model, tokenizer, 2, top=2, length=3), []
    model.model.layers[1].register_forward_pre_hook(lambda m, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True)
    batch = method.collate([Example("abc", "de"), Example("a", "d")])
    method.begin_task([0], "a", 1, 1)
    method.loss(batch)
    assert seen == [batch["input_ids"].shape[1] + 6]
    query = method.query(batch)
    embedded = model.get_input_embeddings()(batch["input_ids"][0, :3]).mean(0)
    assert torch.allclose(query[0], embedded, atol=1e-6) and torch.allclose(method.query(Collator(tokenizer).prompt(["abc", "a"])), query, atol=1e-6)


def test_plain_model_is_what_is_left_without_prompts(tiny_language):
    model, tokenizer = tiny_language()
    method = DualPromptText(model, tokenizer, 2)
    batch = method.collate([Example("abc", "de")])
    before = answer_nll(model, batch)
    method.begin_task([0], "a", 1, 1)
    method.loss(batch)
    assert answer_nll(model, batch).equal(before)


def test_layers_of_deeper_models():
    assert shares(12) == (range(2), range(2, 5)) and shares(2) == (range(1), range(1, 2))
    for depth in range(2, 100):
        general, expert = shares(depth)
        assert len(general) and len(expert) and general.stop == expert.start and expert.stop <= depth


def test_bad_input(tiny_language):
    for cls in VISION:
        with pytest.raises(ValueError, match=f"{cls.name} puts prompts .* Sequential is none"): cls(nn.Sequential(nn.Conv2d(1, 2, 3)), CLASSES)
    with pytest.raises(ValueError, match="cannot lend 9"): L2P(vit(), CLASSES, pool=8, top=9)
    with pytest.raises(ValueError, match="length 0"): L2P(vit(), CLASSES, length=0)
    with pytest.raises(ValueError, match="length 0 is none"): DualPrompt(vit(), CLASSES, lengths=(5, 0))
    for cls, layers in ((DualPrompt, {"expert": (5, 6)}), (DualPrompt, {"general": ()}), (HiDePrompt, {"layers": (-1,)})):
        with pytest.raises(ValueError, match="the model has 6"): cls(vit(), CLASSES, **layers)
    with pytest.raises(ValueError, match="no setting 'depth'"): run("split-digits", L2P, depth=3)
    model, tokenizer = tiny_language()
    with pytest.raises(ValueError, match="600 prompt vectors and 1 tokens are more than the model's context of 512"): L2PText(model, tokenizer, 2, length=200)
    for cls in LANGUAGE:
        with pytest.raises(ValueError, match="context of 512"): cls(*tiny_language(), 2).query(Collator(tokenizer).prompt(["a" * 600]))
    with pytest.raises(ValueError, match="length 0 is none"): DualPromptText(*tiny_language(), 2, lengths=(0, 20))
    with pytest.raises(ValueError, match="the model has 2"): DualPromptText(*tiny_language(), 2, expert=(7,))
    with pytest.raises(ValueError, match="no attention layers"): attention_layers(nn.Linear(2, 2))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.* does not take"): attention_layers(model)
