"""Settings of `bertdist push`: flags and YAML -> a checked PushConfig, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from bertdist.core.args import parse_arguments
from bertdist.core.config import Section, setting
from bertdist.core.errors import ConfigError
from bertdist.core.hub import check_model_folder, hub_name_problem, upload_problem

PROGRAM = "bertdist push"
ABOUT = """Upload a trained model to the Hugging Face Hub, with its model card.
The repository is private unless --public is given.

  bertdist push --model out --to owner/name --dry_run
  bertdist push --model out --to owner/name --license apache-2.0 --language en"""


@dataclass(frozen=True, kw_only=True)
class PushConfig(Section):
    """The settings of `bertdist push`."""

    _argument_group_name = "push"

    model: str = setting(
        "", "Folder of a run, or its best/. Required.", brief="Folder of a run, such as out"
    )
    to: str = setting(
        "",
        "Repository on the hub, owner/name, which is made if it is not there. Required.",
        brief="Repository on the hub: owner/name",
    )
    public: bool = setting(
        False,
        "Make a new repository public, and upload to one that is public. Default: private.",
        brief="Make the repository public, default private",
    )
    dry_run: bool = setting(
        False,
        "List the files and what they replace; upload and write nothing.",
        brief="List the files, upload nothing",
    )
    revision: str | None = setting(
        None, "Branch to upload to, which is made if it is not there. Default: main."
    )
    commit_message: str | None = setting(None, "Message of the commit. Default: Upload NAME.")
    license: str | None = setting(
        None,
        "License of the model, such as apache-2.0, for the model card; it stays in README.md.",
        brief="License of the model, such as apache-2.0",
    )
    language: list[str] | None = setting(
        None,
        "Languages of the texts, such as en de, for the model card; they stay in README.md.",
        brief="Languages of the texts, such as en de",
    )
    base_model: str | None = setting(
        None,
        "Name on the hub of the model that was fine-tuned, for the model card, where training "
        "began with a folder.",
    )
    include_report: bool = setting(
        False, "Upload report.html of the run too. It has texts of rows."
    )


def read_push_config(arguments: Sequence[str]) -> PushConfig:
    """The arguments of `bertdist push`. Raises ConfigError."""
    (config,) = parse_arguments(PROGRAM, [PushConfig], arguments, ABOUT)
    assert isinstance(config, PushConfig)
    problems = []
    if not config.model:
        problems.append("--model is missing: the folder of a run, such as out.")
    if not config.to:
        problems.append("--to is missing: the repository on the hub, owner/name.")
    elif problem := hub_name_problem(config.to):
        problems.append(f"--to {config.to}: {problem}")
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def check_push(config: PushConfig) -> None:
    """Raise BertdistError for what can be seen before the hub is asked."""
    check_model_folder(config.model, f"--model {config.model}")
    if problem := upload_problem(needs_token=not config.dry_run):
        raise ConfigError(f"--to {config.to}: {problem}")
