# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""`python -m trl_distreward` is the command `trl-distreward`."""

from .scripts.cli import main

if __name__ == "__main__":
    main()
