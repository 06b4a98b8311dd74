"""The script of a job: options, environment and arguments inside."""

import subprocess
from pathlib import Path

import pytest

from bertdist.core.errors import ConfigError
from bertdist.core.slurm_script import job_script, read_options, template_options

TEMPLATE = """#!/bin/bash
# What it does.
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -u
printf '%s|' "$@"
"""


def test_options_of_a_script() -> None:
    expected = {"nodes": "1", "requeue": "", "signal": "B:USR1@120"}
    assert template_options(TEMPLATE) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("--qos=high --exclusive", {"qos": "high", "exclusive": ""}),
        ("--qos high -C a100 -pgpu", {"qos": "high", "constraint": "a100", "partition": "gpu"}),
        ("--comment='a b' --mem=0", {"comment": "a b", "mem": "0"}),
        ("--exclude=node[1-3],x --mem=", {"exclude": "node[1-3],x", "mem": ""}),
    ],
)
def test_further_options(text: str, expected: dict[str, str]) -> None:
    assert read_options(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("high", "'high' follows no option"),
        ("--qos=a b", "'b' follows no option"),
        ("-Z 3", "give -Z by its long name"),
        ("--comment='a", "No closing quotation"),
    ],
)
def test_wrong_options(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(text)


def test_the_script_runs_with_its_arguments(tmp_path: Path) -> None:
    options = {**template_options(TEMPLATE), "nodes": "2", "output": "/a b/#%j.log"}
    arguments = ["--config", "it's a $HOME.yaml"]
    text = job_script(TEMPLATE, options, [f"cd '{tmp_path}'", "pwd"], arguments, ["By whom."])
    assert text.splitlines()[:6] == [
        "#!/bin/bash",
        "# By whom.",
        "#SBATCH --nodes=2",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@120",
        '#SBATCH --output="/a b/#%j.log"',
    ]
    assert "# What it does." not in text
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}\n--config|it's a $HOME.yaml|"
