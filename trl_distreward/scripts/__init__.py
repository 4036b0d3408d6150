# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Command-line tools; `trl-distreward` lists them."""
