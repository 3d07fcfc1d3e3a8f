"Where test inputs are sent: the share that reaches its own task, and the score when the task is given."
import json

import pytest
import torch
from test_language import tiny_stream as text_stream
from test_learner import tiny_stream, tiny_vit

from treelora.learner import Learner, _routing, run
from treelora.methods import get_method, list_methods
from treelora.paper.tables import NOTHING, routing_table

VISION = {"hidelora", "hidelora-pet", "hidelora-r10", "treelora-tii", "treelora-branch", "hideprompt", "dualprompt", "dualprompt-tap"}
TEXT = {"hidelora", "treelora-routed", "treelora-branch", "dualprompt"}


def learned(kind, name, make=None, **settings):
    "The loop after its run, the method, and the stream."
    torch.manual_seed(0)
    stream = text_stream(n=8) if make else tiny_stream(classes=6)
    backbone = make() if make else tiny_vit(6)
    method = get_method(name, kind).for_stream(backbone, stream)
    loop = Learner(stream, method, progress=False, **({"epochs": 1, "batch_size": 8, "lr": 0.01} | settings))
    return loop.fit(), method, stream


def inputs_and_answers(stream, i):
    "All test inputs of a task at once, with their right answers."
    if stream.kind == "language": return [e.prompt for e in stream[i].test], [e.answer for e in stream[i].test]
    (images, labels), = stream.loader(i, "test", 10 ** 6)
    return images, labels


@torch.no_grad()
def directly(method, stream, i):
    "Share of a task's inputs that are sent to it, one by one."
    inputs = inputs_and_answers(stream, i)[0]
    sent = [method.route_of(inputs[k:k + 1]).item() for k in range(len(inputs))]
    return sum(s == i for s in sent) / len(sent)


def check(loop, method, stream):
    found, n = loop.routing, len(stream)
    assert found["identity"] == pytest.approx([directly(method, stream, i) for i in range(n)], abs=1e-6)
    given = [stream.evaluate(i, method.predictor_as(i, stream[i])) for i in range(n)]
    assert found["oracle"] == pytest.approx(given, abs=1e-6)
    assert found["mean_identity"] == pytest.approx(sum(found["identity"]) / n, abs=1e-5) and found["mean_oracle"] == pytest.approx(sum(given) / n, abs=1e-5)
    right = [i for i in range(n) if found["identity"][i] == 1]  # then nothing is left to choose
    assert [found["oracle"][i] for i in right] == pytest.approx([loop.R[-1, i] for i in right], abs=1e-6)


@pytest.mark.parametrize("name", sorted(VISION))
def test_images_that_are_sent_to_tasks(name): check(*learned("vision", name))


@pytest.mark.parametrize("name", sorted(TEXT))
def test_prompts_that_are_sent_to_tasks(name, tiny_language): check(*learned("language", name, tiny_language))


def test_which_methods_send_inputs_to_tasks():
    for kind, sending in (("vision", VISION), ("language", TEXT)):
        names = [m["name"] for m in list_methods() if kind in m["kinds"]]
        assert sending <= set(names)
    quiet = [m["name"] for m in list_methods() if "vision" in m["kinds"] and m["name"] not in VISION]
    for name in quiet:
        method = get_method(name, "vision").for_stream(tiny_vit(4), tiny_stream())
        assert not method.routes and method.route_of(torch.zeros(2, 1, 8, 8)) is None, name


@pytest.mark.parametrize("name", ["seqlora", "treelora", "fix", "alone"])
def test_texts_that_are_sent_nowhere(name, tiny_language):
    loop, method, _ = learned("language", name, tiny_language)
    assert loop.routing is None and method.route_of(["a"]) is None


class Astray(get_method("hidelora", "vision")):
    "HiDe-LoRA that sends every image to the task after its own, as its bright row tells."
    name = "astray"

    def likely(self, images):
        tasks = (images[:, 0].sum(2).argmax(1) // 2 + 1).remainder(self.task + 1)
        return torch.nn.functional.one_hot(tasks, self.task + 1).double().log()


def test_a_routing_that_fails_is_told_from_adapters_that_fail():
    settings = dict(model=tiny_vit(6), epochs=8, batch_size=8, lr=0.01, progress=False)
    result = run(tiny_stream(classes=6), Astray, **settings)
    found = result.extra["routing"]
    assert found["identity"] == [0.0] * 3
    assert found["mean_oracle"] >= result.op - 0.02
    honest = run(tiny_stream(classes=6), "hidelora", **settings | {"model": tiny_vit(6)})
    assert honest.extra["routing"]["mean_identity"] > 0.8 and abs(honest.extra["routing"]["mean_oracle"] - honest.op) < 0.1
    assert found["oracle"] == honest.extra["routing"]["oracle"]  # the same adapters, only sent elsewhere
    assert found["mean_oracle"] > result.op + 0.3


class AstrayText(get_method("hidelora", "language")):
    "The same for prompts, which begin with their task's letter."

    def route_of(self, inputs): return torch.tensor([("abc".index(p[0]) + 1) % len(self.bank) for p in inputs])


def test_prompts_that_go_astray(tiny_language):
    runs = [run(text_stream(n=8), method, model=tiny_language(), epochs=1, batch_size=8, lr=0.01, progress=False) for method in (AstrayText, "hidelora")]
    astray, honest = (r.extra["routing"] for r in runs)
    assert astray["identity"] == [0.0] * 3 and astray["oracle"] == honest["oracle"]


@pytest.mark.parametrize("name, chosen", [("hidelora", {4, 5}), ("hideprompt", {4, 5}), ("dualprompt", {0})])
def test_a_given_task_limits_the_classes_where_a_method_weighs_them(name, chosen):
    loop, method, stream = learned("vision", name)
    with torch.no_grad(): method.model.head.bias[0] += 1e3  # class 0 of the first task shouts
    images, _ = inputs_and_answers(stream, 2)
    assert set(method.predict_as(2, images).tolist()) <= chosen
    if name != "dualprompt": assert set(method.predict(images).tolist()) == {0}  # sure of its task or not, 1,000 nats are more


def test_half_precision_answers_under_the_right_adapter(tiny_language):
    "Autocast keeps copies of parameters in half precision until its context ends: an adapter that is put in within it must count."
    _, images, stream = learned("vision", "hidelora")
    for i, row in enumerate(images.bank.values()): row.copy_(0.3 * torch.randn(row.shape, generator=torch.Generator().manual_seed(i)))
    x, _ = inputs_and_answers(stream, 0)
    _, texts, _ = learned("language", "treelora-routed", tiny_language)
    texts.model.eval()  # no dropout
    tree, batch = texts.tl, texts.collate.prompt([e.prompt for e in text_stream(n=8)[0].test])
    rows = [0.3 * torch.randn(texts._adapter().shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    def logits(put):
        put()
        return texts.model(**batch).logits.float()
    cases = [lambda t: images.logits_by(torch.full((len(x),), t), x).float(), lambda t: logits(lambda: texts._put(rows[t])), lambda t: logits(lambda: tree.live.write(rows[t]))]
    for answer in cases:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): within = [answer(t) for t in (0, 1)]
        single = []
        for t in (0, 1):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): single.append(answer(t))
        assert not torch.equal(*single) and all(torch.equal(a, b) for a, b in zip(within, single))


@torch.no_grad()
def test_un_adapted_features_may_speak_of_classes():
    "With a head that says nothing, the answers are the Gaussians' own; a strong head is heard, too."
    with torch.enable_grad(): _, method, stream = learned("vision", "hidelora")
    method.model.head.weight.zero_(), method.model.head.bias.zero_()
    images, labels = inputs_and_answers(stream, 1)
    identity, plain = method.parts.identity, method.plain_features(images)
    likely = torch.tensor(list(identity.stats.means))[identity.log_densities(plain).argmax(1)]
    method.evidence = "class"
    assert torch.equal(method.predict(images), likely)
    own = identity.log_densities(plain)[:, [list(identity.stats.means).index(c) for c in stream[1].classes]].argmax(1)
    assert torch.equal(method.predict_as(1, images), torch.tensor(list(stream[1].classes))[own])
    method.model.head.bias[stream[1].classes[0]] += 1e4
    assert set(method.predict_as(1, images).tolist()) == {stream[1].classes[0]}
    made = lambda name, **options: get_method(name, "vision").for_stream(tiny_vit(6), stream, **options)
    assert made("treelora-branch").options["evidence"] == "class" and made("hidelora").options["evidence"] == "task" and "evidence" not in made("treelora").options
    with pytest.raises(ValueError, match="known are task, class"): made("hidelora", evidence="x")


def test_measuring_counts_as_evaluation_and_changes_nothing(monkeypatch):
    def state(loop, method): return torch.cat([p.detach().flatten() for p in method.model.parameters()]), torch.tensor(loop.R).nan_to_num()
    (one, method, _) = learned("vision", "treelora-branch")
    first = state(one, method)
    monkeypatch.setattr("treelora.learner._routing", lambda loop: None)
    (two, other, _) = learned("vision", "treelora-branch")
    assert all(torch.equal(a, b) for a, b in zip(first, state(two, other))) and two.routing is None
    monkeypatch.undo()
    seconds = one.watch.seconds["evaluate"], one.watch.seconds["train"], one.watch.seconds["end_of_task"]
    assert "routing" not in one.watch.seconds and all(s > 0 for s in seconds)
    before = one.watch.seconds["evaluate"]
    assert _routing(one) == one.routing and one.watch.seconds["evaluate"] > before


def test_un_adapted_features_are_computed_once_a_test_set(monkeypatch):
    loop, method, stream = learned("vision", "hidelora")
    calls, real = [], method._plain
    monkeypatch.setattr(method, "_plain", lambda images: calls.append(len(images)) or real(images))
    _routing(loop)
    assert calls == []  # they were seen after the last task
    method.recall.known.clear()
    _routing(loop)
    assert calls == [len(task.test) for task in stream]


def test_the_result_and_its_table(tmp_path):
    for name in ("treelora", "treelora-tii"):
        result = run(tiny_stream(), name, model=tiny_vit(), epochs=1, batch_size=8, lr=0.01, progress=False)
        path = result.save(tmp_path / "rows" / "quick" / f"{name}-seed0.json")
    saved = json.loads(path.read_text())
    found = saved["extra"]["routing"]
    assert len(found["identity"]) == len(found["oracle"]) == 2 and len(saved["extra"]["movement"]) == 2
    rows = {row[0]: row[1:] for row in routing_table(tmp_path, "rows").rows}
    assert rows["treelora"][1:] == [NOTHING] * 3
    want = [100 * saved["scores"]["op"], 100 * found["mean_identity"], 100 * found["mean_oracle"], 100 * (found["mean_oracle"] - saved["scores"]["op"])]
    assert [float(x) for x in rows["treelora-tii"]] == pytest.approx(want, abs=0.011)
    assert "A dash: the method sends inputs to no task" in routing_table(tmp_path, "rows").note
    assert not routing_table(tmp_path, "rows", methods=["treelora-tii"]).note
    del saved["extra"]["routing"]  # as saved before
    path.write_text(json.dumps(saved))
    assert {row[0]: row[2:] for row in routing_table(tmp_path, "rows").rows} == dict.fromkeys(rows, [NOTHING] * 3)


def test_each_process_measures_some_of_the_tasks_and_all_get_everything():
    loop, _, stream = learned("vision", "treelora-tii")
    whole, asked = loop.routing, []
    class Half:
        "The first of two processes; what the second one would add comes out of the whole."
        placed = staticmethod(loop.processes.placed)
        def row(self, n, score, together):
            own = [score(i) if i % 2 == 0 else None for i in range(n)]
            asked.append(own)
            kept = whole["oracle" if len(asked) == 1 else "identity"]
            return torch.tensor([kept[i] if x is None else x for i, x in enumerate(own)], dtype=torch.float64).numpy()
    loop.processes = Half()
    assert _routing(loop) == whole and asked[1][0] == pytest.approx(whole["identity"][0], abs=1e-6) and asked[1][1] is None
