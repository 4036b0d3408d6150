# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import re
from pathlib import Path

import pytest
import yaml

WORKFLOWS = sorted(Path(__file__).parents[1].glob(".github/workflows/*.yml"))
# what a job may do beyond reading the code, and why: pages and packages are published without a token of a person
GRANTED = {"docs": [{"pages": "write", "id-token": "write"}], "publish": [{"id-token": "write"}]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_digest_and_may_only_read(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"].values()
    assert [job["permissions"] for job in jobs if "permissions" in job] == GRANTED.get(path.stem, [])
    steps = [step for job in jobs for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name) for name in used)
    assert all(not step["with"]["persist-credentials"] for step in steps if "/checkout@" in step.get("uses", ""))
