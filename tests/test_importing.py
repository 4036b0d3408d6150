# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import sys

import pytest

from trl_distreward import load_feature_extractor
from trl_distreward.importing import resolve
from trl_distreward.scripts.arguments import find_reward


@pytest.mark.parametrize("find", [resolve, load_feature_extractor, find_reward])
def test_names_are_not_looked_for_in_the_current_folder_unless_told_so(tmp_path, monkeypatch, find):
    (tmp_path / "lying_here.py").write_text("open('executed', 'w').close()\n\ndef features(images):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"No module named 'lying_here'.*set PYTHONPATH=\. for"):
        find("lying_here.features")
    assert not (tmp_path / "executed").exists()
    monkeypatch.syspath_prepend(tmp_path)
    assert callable(find("lying_here.features"))
    del sys.modules["lying_here"]
