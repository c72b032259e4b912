"""`universal-ct reproduce`: exit codes and JSON. What it computes: tests/evaluation."""

import json
from pathlib import Path

import pytest

from foundation.cli.main import main


def test_json_has_every_record_and_the_exit_code_says_that_not_all_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "universal-ct", "--data", str(tmp_path), "--json"]) == 1
    printed = capsys.readouterr()
    status = {each["record"]["arm"]["dataset"]: each["status"] for each in json.loads(printed.out)}
    assert status["totalsegmentator_example"] == "not reproducible"
    assert status["lidc_idri_0001"] == "files differ", "the data are not there"
    assert f"0 of {len(status)} records reproduced" in printed.err


def test_a_card_without_figures_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "universal-ct-unet"]) == 2
    assert "nothing to run again" in capsys.readouterr().err


def test_an_unknown_card_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "universal-ct-unt"]) == 1
    assert "Did you mean 'universal-ct-unet'" in capsys.readouterr().err
