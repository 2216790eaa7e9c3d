"""The model of merging mappings of files (files.pml): every state, and what the safeguards are for."""

from pathlib import Path

import pytest
from model.test_model import Verifier

SAFEGUARDS = ("NO_MAP_LOCK", "NO_NOTES", "NOT_COMPARED", "WRITTEN_IN_PLACE")

pytestmark = [pytest.mark.require("spin", "gcc"), pytest.mark.timeout(300)]


def test_every_state_is_right(tmp_path: Path) -> None:
    report = Verifier(tmp_path, {}, "-O1", "files.pml").search()
    assert "errors: 0" in report, report
    assert "Search not completed" not in report, report
    assert "max search depth too small" not in report, report


@pytest.mark.parametrize("switch", SAFEGUARDS)
def test_a_missing_safeguard_is_found(tmp_path: Path, switch: str) -> None:
    report = Verifier(tmp_path, {switch: 1}, "-O1", "files.pml").search()
    assert "errors: 1" in report, report
    assert "assertion violated ((vma==0)||(content==expected))" in report, report
