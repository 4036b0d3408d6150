# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import subprocess
import sys

import trl_distreward


def test_import_is_lazy():
    code = "import sys, trl_distreward; print(sorted(m for m in ('torch', 'diffusers', 'trl') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_resolves():
    for name in trl_distreward.__all__:
        value = getattr(trl_distreward, name)
        assert getattr(value, "__name__", name) == name
    assert set(trl_distreward.__all__) <= set(dir(trl_distreward))
