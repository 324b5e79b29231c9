"""The alerts: they name metrics that there are, and fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.metrics import Metrics
from tests.conftest import REPOSITORY

RULES = REPOSITORY / "deploy" / "prometheus" / "rules.yaml"
CASES = Path(__file__).parent / "rules.yaml"
ALERTS = [rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_rules_ask_for_metrics_that_there_are() -> None:
    known = set()
    for family in Metrics().registry.collect():
        known |= {family.name, f"{family.name}_total", f"{family.name}_count", f"{family.name}_info"}
    asked = set(re.findall(r"sotto_\w+", RULES.read_text()))
    assert asked
    assert asked <= known


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_is_tried_both_ways(alert: str) -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {bool(case.get("exp_alerts")) for case in cases if case["alertname"] == alert} == {True, False}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)")
def test_alerts_fire_when_they_should() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", str(CASES)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
