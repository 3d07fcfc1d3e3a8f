"Reading a finished run's features in several ways."
import pytest
from test_sent import learned

from treelora.experiments.photographs import kept_features, read


def test_readers_agree_with_the_method_itself():
    loop, method, stream = learned("vision", "hidelora")
    rows = {r["reader"]: r for r in read(kept_features(method, stream))}
    head, both = rows["adapted: the head, as HiDeLoRA answers"], rows["both: un-adapted Gaussians and the head"]
    assert head["own task"] == pytest.approx(100 * loop.routing["mean_identity"], abs=1e-3)
    assert head["all classes"] == pytest.approx(100 * loop.R[-1].mean(), abs=1e-3)
    assert head["task told"] == pytest.approx(100 * loop.routing["mean_oracle"], abs=1e-3)
    method.evidence = "class"
    answers = [stream.evaluate(i, method.predictor(stream[i])) for i in range(len(stream))]
    assert both["all classes"] == pytest.approx(100 * sum(answers) / len(answers), abs=1e-3)
    assert rows["un-adapted: class Gaussians"]["task told"] >= rows["un-adapted: class Gaussians"]["all classes"]
