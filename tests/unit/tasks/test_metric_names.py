"""Names of scores are checked before torch is imported, in the words of `load_metrics`."""

import pytest

from bertdist.core.errors import ConfigError
from bertdist.tasks import metrics
from bertdist.tasks.labels import SINGLE_LABEL
from bertdist.tasks.metric_names import METRIC_NAMES, check_metric_names


def test_the_names_are_those_of_the_table() -> None:
    assert sorted(METRIC_NAMES) == sorted(metrics._METRICS)
    assert len(set(METRIC_NAMES)) == len(METRIC_NAMES)


@pytest.mark.parametrize("name", ["acuracy", "top_0_accuracy", "f1-macro"])
def test_an_unknown_name_is_the_error_of_loading_it(name: str) -> None:
    with pytest.raises(ConfigError) as early:
        check_metric_names(["accuracy", name])
    with pytest.raises(ConfigError) as late:
        metrics.load_metrics(["accuracy", name], SINGLE_LABEL, ["a", "b"])
    assert str(early.value) == str(late.value)
    assert str(early.value).startswith(f"--metrics {name}: unknown score. Did you mean ")


def test_known_names_and_those_of_a_users_own_pass() -> None:
    check_metric_names([*METRIC_NAMES, "top_5_accuracy", "./mine.py", "mine/", "hub:a/b"])
