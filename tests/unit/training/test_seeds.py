"""--seeds: the runs, their scores, which is the best, and what is refused."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from forked import run_ranks

from bertdist.core.args import read_config
from bertdist.core.config import TrainConfig
from bertdist.core.errors import ConfigError
from bertdist.core.hub import model_folder
from bertdist.data.train_test_split import hold_out_of
from bertdist.training.seeds import run_of_seed, train_seeds

NEEDED = ["--model_name_or_path=m", "--output_dir=o", "--train_file=t.tsv", "--use_cpu"]
SCORED = [*NEEDED, "--validation_split=0.1"]
ACCURACY = {7: 0.8, 8: 0.9, 9: 0.7}


def train_made_up(
    accelerator: Accelerator, words: list[str], stop_after: int = 3
) -> tuple[bool, list[TrainConfig]]:
    """Whether all runs are done, and the runs. A run does nothing but write made-up scores."""
    runs: list[TrainConfig] = []

    def train(config: TrainConfig) -> bool:
        runs.append(config)
        if ended := len(runs) <= stop_after:
            folder, seed = Path(config.run.output_dir), config.run.seed
            scores = {"loss": ACCURACY[seed], "accuracy": ACCURACY[seed], "mcc": None}
            if accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                report = {"step": seed, "scores": scores}
                (folder / "evaluation.json").write_text(json.dumps(report))
                (folder / "best").mkdir(exist_ok=True)
            accelerator.wait_for_everyone()
        return ended

    return train_seeds(read_config(words), train), runs


def test_a_metric_by_its_file_does_not_say_how_its_score_is_called() -> None:
    words = [*SCORED, "--seeds=2", "--metrics", "accuracy", "./mine.py"]
    config = read_config([*words, "--metric_for_best_model=./mine.py"])
    with pytest.raises(ConfigError, match="to compare runs, give the name of the score"):
        train_seeds(config, lambda config: True)


def test_runs_differ_in_the_seed_alone_and_are_summed_up(tmp_path: Path) -> None:
    words = [*SCORED, f"--output_dir={tmp_path / 'out'}", "--seeds=3", "--seed=7"]
    seen = run_ranks(2, train_made_up, words)
    assert all(finished for finished, _ in seen) and seen[0][1] == seen[1][1]
    config = read_config(words)
    assert seen[0][1] == [run_of_seed(config, seed) for seed in (7, 8, 9)]
    for run, seed in zip(seen[0][1], (7, 8, 9), strict=True):
        assert (run.run.seed, run.run.seeds) == (seed, None)
        assert run.run.output_dir == str(tmp_path / "out" / "seeds" / str(seed))
        assert run.optim == config.optim and run.task == config.task
        hold_out = hold_out_of(run.data, run.run.seed)
        assert hold_out is not None and hold_out.seed == 7  # the same rows in all runs
    alone = hold_out_of(config.data, 8)
    assert alone is not None and alone.seed == 8  # the control
    report = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert report["seeds"] == [7, 8, 9] and report["metric"] == "accuracy"
    assert report["best"] == {"seed": 8, "folder": "seeds/8", "score": 0.9}
    assert report["scores"]["accuracy"] == {
        "mean": pytest.approx(0.8),
        "std": pytest.approx(statistics.stdev(ACCURACY.values())),
    }
    assert report["scores"]["mcc"] == {"mean": None, "std": None} and report["test_scores"] == {}
    assert [entry["step"] for entry in report["per_seed"]] == [7, 8, 9]
    assert model_folder(tmp_path / "out") == str(tmp_path / "out" / "seeds" / "8" / "best")


def test_the_lowest_loss_is_the_best_where_it_selects(tmp_path: Path) -> None:
    words = [*SCORED, f"--output_dir={tmp_path}", "--seeds", "7", "9", "--validation_file=v.tsv"]
    words = [word for word in words if "split" not in word]
    run_ranks(1, train_made_up, [*words, "--metric_for_best_model=loss"])
    assert json.loads((tmp_path / "seeds.json").read_text())["best"]["seed"] == 9


def test_a_stopped_command_resumes(tmp_path: Path) -> None:
    words = [*SCORED, f"--output_dir={tmp_path}", "--seeds=3", "--seed=7"]
    ((finished, runs),) = run_ranks(1, train_made_up, words, 1)
    assert not finished and len(runs) == 2 and not (tmp_path / "seeds.json").exists()
    ((finished, again),) = run_ranks(1, train_made_up, words)
    assert finished and again[:2] == runs and (tmp_path / "seeds.json").exists()


def test_a_strangers_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "seeds.json").write_text("[]")

    def tell(accelerator: Accelerator) -> str:
        with pytest.raises(ConfigError) as error:
            train_made_up(accelerator, [*SCORED, f"--output_dir={tmp_path}", "--seeds=2"])
        return str(error.value)

    assert run_ranks(1, tell)[0].startswith("No seeds wrote ")
    assert (tmp_path / "seeds.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("words", "seeds"),
    [(["--seeds=5"], [42, 43, 44, 45, 46]), (["--seeds", "3", "1"], [3, 1]), ([], [])],
)
def test_one_number_is_how_many_and_several_are_the_seeds(
    words: list[str], seeds: list[int]
) -> None:
    assert read_config([*SCORED, *words]).run.seed_list == seeds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SCORED, "--seeds=1"], "--seeds is 1; expected how many, from 2 to 100, or several seeds"),
        ([*SCORED, "--seeds=4000"], "--seeds is 4000; expected how many, from 2 to 100"),
        ([*SCORED, "--seeds", "1", "1"], "--seeds repeats a seed: 1 1."),
        ([*SCORED, "--seeds", "1", "-2"], "--seeds is 1 -2: expected seeds from 0 to 4294967295."),
        ([*SCORED, "--seeds", "1", "2", "--seed=3"], "--seed has no effect: --seeds 1 2 names the"),
        ([*NEEDED, "--seeds=2", "--folds=3"], "--seeds and --folds both name several runs"),
        ([*NEEDED, "--seeds=2"], "--seeds needs rows to compare the runs on"),
        ([*SCORED, "--seeds=2", "--dry_run"], "--dry_run shows the plan of one run"),
        ([*SCORED, "--seeds=2", "--resume_from_checkpoint=c"], "the run of each seed resumes its"),
        ([*NEEDED, "--split_seed=2"], "--split_seed needs a share to hold out"),
        ([*SCORED, "--split_seed=-2"], "--split_seed is -2; expected from 0 to 4294967295."),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(words)
    assert message in str(error.value)
    assert read_config([*SCORED, "--seeds=2", "--split_seed=2"]).data.split_seed == 2


def test_a_given_split_seed_stays() -> None:
    config = read_config([*SCORED, "--seeds=2", "--split_seed=5"])
    assert [run_of_seed(config, seed).data.split_seed for seed in (42, 43)] == [5, 5]
    other: Any = read_config([*NEEDED, "--validation_file=v.tsv", "--seeds=2"])
    assert run_of_seed(other, 42).data.split_seed is None
