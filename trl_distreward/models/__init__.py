# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Networks, each in a single file that imports only torch and diffusers, so that it can travel to the Hub."""
