# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Networks as single files that import only torch and diffusers, so that they can travel to the Hub."""
