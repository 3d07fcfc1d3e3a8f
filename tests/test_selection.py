"Methods that choose among earlier adapters on a tiny untrained Llama: routes, mixtures, importance, and what they refuse."
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from test_language import tiny_run, tiny_stream
from test_learner import tiny_run as image_run, tiny_vit
from treelora.learning.language import Collator, generate, prompt_features
from treelora.learner import Learner
from treelora.methods.selection import (SAPT, ClassCentres, HiDeLoRAAuthorsText, HiDeLoRAPET, HiDeLoRAPET10, HiDeLoRAText, SAPTReplay, attention_shift, clustered, Importance, SharedAttention, TaSL, important, mixture, past_share, prompt_peaks,
                                       rescaled, rows_apart, side_by_side)

ALL = [HiDeLoRAText, SAPT, TaSL]


def learned(make, build, n_tasks=3, lr=0.05, **options):
    "A method that has learned a stream, and the stream."
    stream = tiny_stream(n_tasks)
    method = build.for_stream(make(), stream, **options)
    Learner(stream, method, epochs=2, batch_size=4, lr=lr, progress=False).fit()
    return method, stream


def prompts(stream): return [task.test[i].prompt for task in stream for i in range(len(task.test))]


@torch.no_grad()
def logits(method, batch): return method.model.eval()(**batch).logits


@pytest.mark.parametrize("method", ALL)
def test_every_method_runs_and_repeats(tiny_language, method):
    first, second = (tiny_run(tiny_language, method, curves=2) for _ in range(2))
    assert first.R.shape == (3, 3) and not np.isnan(first.R[np.tril_indices(3)]).any()
    assert np.array_equal(first.R, second.R, equal_nan=True) and first.curves == second.curves
    assert first.memory["stored_bytes"] > 0 and first.config["kind"] == "language"
    first.as_dict()


@pytest.mark.parametrize("method", ALL)
def test_bf16(tiny_language, method): assert not np.isnan(tiny_run(tiny_language, method, precision="bf16").R[2]).any()


def test_prompts_find_their_task_and_get_its_adapter(tiny_language):
    method, stream = learned(tiny_language, HiDeLoRAText)
    texts = prompts(stream)[::-1]
    tasks = method.identify(texts).tolist()
    assert tasks == [k for k in (2, 1, 0) for _ in range(4)]
    alone = []
    for text, k in zip(texts, tasks):
        method._put(method.bank[k])
        alone += generate(method.model, method.collate, [text], 4)
    method._put(method.initial)  # what the model itself holds does not matter
    assert method.predict(texts, 4) == alone and len(set(alone)) > 1


def test_distances_are_those_of_all_features_at_once(tiny_language):
    method, stream = learned(tiny_language, HiDeLoRAText, n_tasks=2)
    x = [prompt_features(method.model, method.collate([*task.train])).double() for task in stream]
    means, scatter = [f.mean(0) for f in x], sum((f - f.mean(0)).T @ (f - f.mean(0)) for f in x)
    cov = scatter / (sum(map(len, x)) - 2)
    cov += 1e-2 * cov.diagonal().mean() * torch.eye(len(cov))
    new = prompt_features(method.model, method.collate.prompt(["a: say 99.", "c"])).double()
    expected = torch.stack([((new - m) @ torch.linalg.inv(cov) * (new - m)).sum(1) for m in means], dim=1)
    assert torch.allclose(method.stats.distances(new), expected, rtol=1e-3)


def test_an_adapter_starts_from_the_last_one(tiny_language):
    for build, fresh in ((HiDeLoRAText, False), (TaSL, False), (SAPT, True)):
        method, stream = learned(tiny_language, build)
        last = method._adapter()
        method.begin_task([2], "again", 1, 1)
        assert torch.equal(method._adapter(), method.initial if fresh else last) and not torch.equal(last, method.initial)


def test_answers_are_remembered_by_task_and_length(tiny_language):
    method, stream = learned(tiny_language, HiDeLoRAText, n_tasks=1)
    text = prompts(stream)[0]
    short, long = (method.predict([text], n)[0] for n in (1, 6))
    assert long.startswith(short) and len(method.memo.known) == len(stream[0].test) + 2


@pytest.mark.parametrize("seed", range(4))
def test_weights_sum_to_one(seed):
    attention, g = SharedAttention(12, hidden=5, seed=seed), torch.Generator().manual_seed(seed)
    for k in range(6):
        attention.add_task()
        weights = attention(10 * torch.randn(20, 12, generator=g))
        assert weights.shape == (20, k + 1) and torch.allclose(weights.sum(1), torch.ones(20)) and (weights >= 0).all()
        assert [key.requires_grad for key in attention.keys] == [False] * k + [True]
    assert len({tuple(key.tolist()) for key in attention.keys}) == 6


def test_separated_queries_select_their_task():
    attention, centres = SharedAttention(12, hidden=12, seed=3), 4 * torch.eye(5, 12)
    for _ in range(5): attention.add_task()
    with torch.no_grad():
        for key, query in zip(attention.keys, attention.query(centres)): key.copy_(100 * query)
    near = centres.repeat(8, 1) + 0.05 * torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    weights = attention(near)
    assert weights.argmax(1).tolist() == list(range(5)) * 8 and weights.amax(1).min() > 0.99


def test_peaks_see_neither_padding_nor_answer(tiny_language):
    method = SAPT(*tiny_language(), n_tasks=2)
    examples = [tiny_stream()[0].train[i] for i in (0, 10)]
    with_answers = prompt_peaks(method.model, method.collate(examples))
    alone = torch.cat([prompt_peaks(method.model, method.collate.prompt([e.prompt])) for e in examples])
    assert torch.equal(with_answers, alone)
    method._put(torch.ones_like(method.initial))
    assert torch.equal(prompt_peaks(method.model, method.collate(examples)), alone)  # un-adapted


def test_mixture_is_the_weighted_sum(tiny_language):
    method, stream = learned(tiny_language, SAPT)
    model, g = method.model.eval(), torch.Generator().manual_seed(0)
    weights = torch.rand(4, 3, generator=g).softmax(1)
    for l, name in enumerate(method.layout.names):
        layer = model.get_submodule(name)
        x, expected = torch.randn(4, 7, layer.in_features, generator=g), 0
        for k, adapter in enumerate(method.bank):
            A, B = (M[0] for M in method.layout.pairs(adapter[None])[l])
            expected = expected + weights[:, k, None, None] * layer.scaling["default"] * (x @ A.T @ B.T)
        with torch.no_grad(), method.mixed(weights): assert torch.allclose(layer(x), layer.base_layer(x) + expected, atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


def test_attention_to_one_task_is_that_tasks_adapter(tiny_language):
    method, stream = learned(tiny_language, SAPT)
    batch, which = method.collate.prompt(prompts(stream)[::3]), torch.tensor([1, 0, 2, 1])
    with method.mixed(F.one_hot(which, 3).float()): mixed = logits(method, batch)
    for row, k in enumerate(which):
        method._put(method.bank[k])
        assert torch.allclose(mixed[row], logits(method, batch)[row], atol=1e-4)


def test_a_task_trains_its_own_block_and_key_only(tiny_language):
    method, stream = learned(tiny_language, SAPT, n_tasks=2)
    blocks, keys = [b.clone() for b in method.bank], [k.detach().clone() for k in method.attention.keys]
    query = [p.detach().clone() for p in method.attention.query.parameters()]
    method.n_tasks = 3
    Learner(stream := tiny_stream(3), method, epochs=1, batch_size=4, lr=0.05, progress=False)._stage([2])
    assert len(method.bank) == 3 and all(map(torch.equal, blocks, method.bank)) and all(map(torch.equal, keys, method.attention.keys))
    assert any(not torch.equal(a, b) for a, b in zip(query, method.attention.query.parameters()))  # what makes old prompts drift
    assert len(method.attended[-1]) == 3 and sum(method.attended[-1]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pace", [1.0, 0.25])
def test_attention_goes_a_share_of_each_step(tiny_language, pace):
    method, stream = learned(tiny_language, SAPT, n_tasks=2, pace=pace)
    method.begin_task([1], "again", 1, 1)
    trained, block = method._attention_trained(), method.layout.params[1]
    before, own = [p.detach().clone() for p in trained], block.detach().clone()
    opt, batch = torch.optim.SGD(method.parameters(), 1.0), method.collate([*stream[1].train][:4])
    loss = method.loss(batch)
    loss.backward()
    method.after_backward(batch, loss)
    opt.step()
    method.after_step()
    for p, old in zip(trained, before): assert torch.allclose(p, old - pace * p.grad, atol=1e-6)
    assert torch.allclose(block, own - block.grad)  # the adapter goes all of it
    stands = [p.detach().clone() for p in trained]
    method.after_step()  # of a step that was left out
    assert all(map(torch.equal, trained, stands))


def test_first_task_of_sapt_is_plain_lora(tiny_language):
    method, stream = learned(tiny_language, SAPT, n_tasks=1)
    batch = method.collate.prompt(prompts(stream))
    plain = logits(method, batch)
    with method.mixed(method.weights(batch)): assert torch.allclose(logits(method, batch), plain, atol=1e-6)


@pytest.mark.parametrize("build", ALL)
def test_an_interrupted_task_leaves_nothing(tiny_language, build):
    method, stream = learned(tiny_language, build, n_tasks=2)
    before, answers = method._adapter(), method.predict(prompts(stream), 4)
    method.begin_task([1], "broken", 1, 1)
    method._put(torch.ones_like(before))
    method.abort_task()
    assert torch.equal(method._adapter(), before) and method.predict(prompts(stream), 4) == answers
    method.begin_task([1], "again", 1, 1)
    if build is SAPT: assert [key.requires_grad for key in method.attention.keys] == [False, False, True]


@pytest.mark.parametrize("seed", range(3))
def test_importance_is_its_definition(seed):
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=g, requires_grad=True) for shape in ((3, 4), (5,), (2, 2, 2))]
    importance, alpha, beta = Importance(params, (0.6, 0.9)), 0.6, 0.9
    sensitivity, uncertainty = ([[0.0] * p.numel() for p in params] for _ in range(2))
    for _ in range(5):
        for u, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=g)
            for i, (w, dw) in enumerate(zip(p.flatten().tolist(), p.grad.flatten().tolist())):
                now = abs(w * dw)
                sensitivity[u][i] = alpha * sensitivity[u][i] + (1 - alpha) * now
                uncertainty[u][i] = beta * uncertainty[u][i] + (1 - beta) * abs(now - sensitivity[u][i])
        importance.observe()
        with torch.no_grad():
            for p in params: p.sub_(0.1 * p.grad)
    expected = [sum(s * u for s, u in zip(*rows)) / len(rows[0]) for rows in zip(sensitivity, uncertainty)]
    assert importance.scores().tolist() == pytest.approx(expected, rel=1e-4)


def test_consolidation_by_cases(tiny_language):
    class Watched(TaSL):
        def _consolidate(self, past, present):
            self.reached, self.sides = self._adapter(), (past, present)
            super()._consolidate(past, present)
    method, _ = learned(tiny_language, Watched, n_tasks=2, importance=0.5, weight=0.9)
    past, present = method.sides
    for p, old, new, a, b in zip(method.layout.params, method.layout.views(method.before), method.layout.views(method.reached), past, present):
        wanted = 0.9 * old + 0.1 * new if a and b else old if a else new if b else (old + new) / 2
        assert torch.allclose(p, wanted, atol=1e-6)
    assert sum(method.fates[0].values()) == len(past) and int(past.sum()) == int(present.sum()) == len(past) // 2


def test_one_fate_a_pair_of_flags():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert past_share(a, b, 0.6).tolist() == pytest.approx([0.6, 1, 0, 0.5])
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert important(scores, 0.2).sum() == 10 and scores[important(scores, 0.2)].min() > scores[~important(scores, 0.2)].max()
    assert torch.equal(important(rescaled(scores), 0.2), important(scores, 0.2)) and not rescaled(torch.full((4,), 3.0)).any()


def test_memory_is_what_is_kept(tiny_language):
    sizes = {}
    for build in ALL:
        method, _ = learned(tiny_language, build, n_tasks=3)
        sizes[build] = method.stored()
    adapter, units = method.initial.numel() * 4, len(method.layout.params)
    assert sizes[HiDeLoRAText] == {"adapters": 3 * adapter, "feature moments": 8 * (3 * 32 + 32 * 32)}
    assert sizes[SAPT] == {"adapters": 3 * adapter, "keys": 4 * 3 * 32, "query projection": 4 * (2 * 32 * 100 + 2 * 32)}
    assert sizes[TaSL] == {"adapters": sum(p.numel() for p in method.layout.params) * 4, "importance": 4 * units}


def test_before_the_first_task(tiny_language):
    with pytest.raises(ValueError, match="no task has been learned"): HiDeLoRAText(*tiny_language(), n_tasks=2).predict(["a"])
    with pytest.raises(ValueError, match="no task has begun"): SAPT(*tiny_language(), n_tasks=2).predict(["a"])
    assert all(build(*tiny_language(), n_tasks=2).stored()["adapters"] == 0 for build in ALL)


@pytest.mark.parametrize("build, options, says", [
    (SAPT, {"hidden": 0}, "at least 1, not hidden=0"), (SAPT, {"pace": 0}, "pace=0,"), (SAPT, {"pace": 1.5}, "pace=1.5"), (TaSL, {"importance": 0}, "importance=0 must be a fraction"),
    (TaSL, {"weight": 1.1}, "weight=1.1"), (TaSL, {"smoothing": 1.0}, "smoothing=1.0 must lie"), (HiDeLoRAText, {"hidden": 3}, "no setting 'hidden'")])
def test_bad_settings(tiny_language, build, options, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")): tiny_run(tiny_language, build, **options)


def test_wrong_numbers_of_weights_and_missing_gradients(tiny_language):
    method, _ = learned(tiny_language, SAPT, n_tasks=2)
    with pytest.raises(ValueError, match="2 adapters to mix, but 3 weights"):
        with method.mixed(torch.ones(1, 3)): pass
    with pytest.raises(ValueError, match="gradient of every unit"): Importance([torch.ones(2, requires_grad=True)]).observe()


def test_blocks_that_cannot_be_mixed(tiny_language):
    model, tokenizer = tiny_language()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"]))
    with pytest.raises(ValueError, match="linear LoRA layers only.*embed_tokens"): SAPT(adapted, tokenizer, n_tasks=2)


def test_wide_adapters(tiny_language):
    method = SAPT(*tiny_language(), n_tasks=2)
    assert side_by_side(method.layout, []) == []
    pairs = side_by_side(method.layout, [method.initial, 2 * method.initial + 1])
    for (A, B), (a, b) in zip(pairs, method.layout.shapes): assert A.shape == (2 * a[0], a[1]) and B.shape == (b[0], 2 * b[1])


def test_rows_apart_is_the_cross_entropy_of_finding_oneself():
    A = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    S = A @ A.T / 0.8
    assert torch.allclose(rows_apart(A), (S.logsumexp(1) - S.diagonal()).mean(), atol=1e-6)
    same = torch.ones(5, 7)
    assert rows_apart(same).item() == pytest.approx(np.log(5), abs=1e-5) and rows_apart(2 * torch.eye(5, 7)) < rows_apart(same)


def test_the_authors_hidelora_is_sequential_training_and_a_term_on_rows(tiny_language):
    from treelora.methods.language import SeqLoRA
    ends = {}

    class Watched(HiDeLoRAAuthorsText):
        name = "watched"
        def end_task(self, batches):
            super().end_task(batches)
            cosines = [F.normalize(A, dim=1) @ F.normalize(A, dim=1).T for A in self.layout.params[::2]]
            ends.setdefault(self.lam, []).append((self.penalty().item(), torch.stack([c.fill_diagonal_(0).clamp(min=0).mean() for c in cosines]).mean().item()))

    plain, none, some = tiny_run(tiny_language, SeqLoRA), tiny_run(tiny_language, Watched, lam=0.0), tiny_run(tiny_language, Watched, epochs=3)
    assert np.array_equal(plain.R, none.R, equal_nan=True)
    assert some.memory["stored_bytes"] == 0 and some.config["method_config"] | {"lam": 0.5, "temperature": 0.8} == some.config["method_config"]
    assert ends[0.5][-1][0] < 0.8 * ends[0.0][-1][0] and ends[0.5][-1][1] < 0.8 * ends[0.0][-1][1]


def test_the_authors_hidelora_answers_with_its_latest_adapter(tiny_language):
    method, stream = learned(tiny_language, HiDeLoRAAuthorsText)
    asked = prompts(stream)
    batch = [generate(method.model, method.collate, [p], 4)[0] for p in asked]
    assert method.predict(asked, 4) == batch and not hasattr(method, "bank")


@pytest.mark.parametrize("options, says", [({"lam": -1.0}, "lam=-1.0 must not be negative"), ({"temperature": 0.0}, "temperature=0.0 must be above 0")])
def test_bad_settings_of_the_authors_hidelora(tiny_language, options, says):
    with pytest.raises(ValueError, match=says): HiDeLoRAAuthorsText(*tiny_language(), 2, **options)


def test_clusters_are_those_of_well_separated_groups():
    g = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(60, 4, generator=g) + 10 * torch.eye(4)[torch.arange(3).repeat_interleave(20)]
    best = min((clustered(x, 3, seed) for seed in range(5)), key=lambda c: sum((x[c == k] - x[c == k].mean(0)).square().sum() for k in c.unique()))
    assert all(len(best[i:i + 20].unique()) == 1 for i in (0, 20, 40)) and len(best.unique()) == 3
    assert clustered(x[:2], 5).tolist() in ([0, 1], [1, 0]) and clustered(torch.zeros(4, 2), 3).unique().numel() == 1


@pytest.mark.parametrize("statistics", ["centroids", "covariance"])
def test_drawn_features_are_like_a_class(statistics):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=g) @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.2]]) + 5
    known = ClassCentres(statistics, k=10)
    known.take(x, 4), known.take(-x, 2)
    drawn, labels = known.draw(4000)
    assert labels.unique(return_counts=True)[1].tolist() == [4000, 4000]
    for label, sign in ((4, 1), (2, -1)):
        own = drawn[labels == label]
        if statistics == "covariance":
            assert torch.allclose(torch.cov(own.T), torch.cov(x.T), atol=0.4) and torch.allclose(own.mean(0), sign * x.mean(0), atol=0.2)
            continue
        assert torch.allclose(own.mean(0), known.centres[label].mean(0), atol=0.2)  # all centres alike
        assert torch.cdist(own, sign * x).min(1).values.median() < 0.7  # where the class lies
    if statistics == "covariance": assert known.stored() == 4 * 2 * (3 + 9)
    else: assert all(2 <= len(c) <= 10 for c in known.centres.values()) and known.stored() == 2 * 4 * 3 * sum(map(len, known.centres.values()))
    known.take(x[:1], 4)
    assert known.draw(5)[0].isfinite().all()


def test_a_new_adapter_leans_on_the_earlier_ones():
    ends = []

    class Watched(HiDeLoRAPET):
        name = "watched"
        def end_task(self, batches):
            before = self._adapter()
            super().end_task(batches)
            ends.append((before, self._adapter(), self.bank[self.task]))

    result = image_run(Watched, momentum=0.3)
    (first, kept, stored), (second, leant, last) = ends
    assert torch.equal(first, kept) and torch.equal(kept, stored) and torch.equal(leant, last)
    assert torch.allclose(leant, 0.7 * second + 0.3 * stored, atol=1e-6)
    assert set(result.memory["stored"]) == {"adapters", "class moments", "class centres"} and min(result.memory["stored"].values()) > 0
    assert result.config["method_config"] | {"reg": 0.001, "momentum": 0.3, "statistics": "centroids", "centroids": 10, "r": 4} == result.config["method_config"]


def test_without_its_parts_it_trains_as_hidelora_does():
    def adapters(cls, **options):
        kept = []

        class Watched(cls):
            name = "watched"
            def end_task(self, batches):
                kept.append(self._adapter())
                super().end_task(batches)

        image_run(Watched, **options)
        return kept

    from treelora.methods.seqlora import HiDeLoRA
    plain, bare, whole = adapters(HiDeLoRA), adapters(HiDeLoRAPET, reg=0.0, momentum=0.0), adapters(HiDeLoRAPET, reg=0.1, momentum=0.0)
    assert torch.allclose(plain[0], bare[0], atol=1e-6) and not torch.allclose(plain[0], whole[0], atol=1e-5)


def test_ranks():
    assert [cls(tiny_vit(), [(0, 1), (2, 3)]).options["r"] for cls in (HiDeLoRAPET, HiDeLoRAPET10)] == [4, 10]


@pytest.mark.parametrize("options, says", [({"statistics": "x"}, "must be \"centroids\""), ({"centroids": 0}, "centroids=0 must be at least 1"),
                                           ({"momentum": 1.0}, "momentum=1.0 must lie in"), ({"reg": -1.0}, "reg=-1.0 must not be negative")])
def test_bad_settings_of_hidelora_pet(options, says):
    with pytest.raises(ValueError, match=says): HiDeLoRAPET(tiny_vit(), [(0, 1), (2, 3)], **options)


def test_shift_is_the_divergence():
    g = torch.Generator().manual_seed(0)
    then, now = torch.rand(6, 3, generator=g), torch.rand(6, 3, generator=g)
    then, now = then / then.sum(1, keepdim=True), now / now.sum(1, keepdim=True)
    assert attention_shift(then, now).item() == pytest.approx((then * (then / now).log()).sum(1).mean().item(), rel=1e-5)


def test_remembered_prompts_hold_the_attention(tiny_language):
    "The shift of old prompts' attention is smaller where it is in the loss."
    shifts = {}

    class Watched(SAPTReplay):
        name = "watched"
        def end_task(self, batches):
            with torch.no_grad(): shifts.setdefault(self.reflect, []).append(float(self.shifted()))
            super().end_task(batches)

    for reflect in (0.0, 50.0): result = tiny_run(tiny_language, Watched, reflect=reflect, replay=5, pace=1.0, epochs=3)
    assert shifts[0.0][0] == shifts[50.0][0] == 0 and shifts[50.0][1] < 0.9 * shifts[0.0][1]
    assert result.memory["stored"]["prompt vectors"] == 4 * (3 * 5 * 32 + 5 * (1 + 2 + 3)) and result.config["method_config"]["replay"] == 5
    plain, same = tiny_run(tiny_language, SAPT), tiny_run(tiny_language, SAPTReplay, reflect=0.0)
    assert np.array_equal(plain.R, same.R, equal_nan=True)
    with pytest.raises(ValueError, match="reflect=-1 must not be negative"): SAPTReplay(*tiny_language(), 2, reflect=-1)
