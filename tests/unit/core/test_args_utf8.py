"""Arguments that are not UTF-8 are one line each, before anything is read or written."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bertdist.core.args import read_config, read_predict_config
from bertdist.core.errors import ConfigError

BYTES = os.fsdecode(b"x\xff")
TRAIN = {"model_name_or_path": "m", "train_file": "t.tsv", "output_dir": "o"}


@pytest.mark.parametrize(
    ("read", "words", "name"),
    [
        (read_config, {"output_dir": BYTES}, "output_dir"),
        (read_config, {"model_name_or_path": BYTES}, "model_name_or_path"),
        (read_config, {"train_file": f"a.tsv {BYTES}"}, "train_file"),
        (read_config, {"text_column": BYTES}, "text_column"),
        (read_predict_config, {"model": "m", "text": BYTES}, "text"),
    ],
)
def test_bytes_that_are_not_utf8_are_refused_by_their_flag(
    read: Callable[[Sequence[str]], Any], words: dict[str, str], name: str
) -> None:
    settings = {**(TRAIN if read is read_config else {}), **words}

    def arguments(change: Callable[[str], str]) -> list[str]:
        return [
            word
            for flag, value in settings.items()
            for word in (f"--{flag}", *change(value).split())
        ]

    with pytest.raises(ConfigError) as caught:
        read(arguments(str))
    expected = f"--{name} 'x\\udcff' is not UTF-8: rename it, or use a UTF-8 locale."
    assert str(caught.value) == expected
    read(arguments(lambda value: value.replace(BYTES, "x\xe9")))  # the control
