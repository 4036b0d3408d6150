# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Sets of images, their features, and reports of how far one is from another."""
