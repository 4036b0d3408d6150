# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Generators of random numbers that are keyed: one for each purpose, step and image, and no two alike."""

import hashlib

import numpy as np
import torch

# torch's CPU generator is MT19937; its saved state holds 624 words of 32 bits, each in 8 bytes, from this byte on.
_FIRST_WORD = 24
_NUM_WORDS = 624


def keyed_generator(*key: int | str) -> torch.Generator:
    """Makes a CPU generator whose whole state is the hash of a key: `manual_seed` would take 32 bits alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=32).digest()
    sequence = np.random.SeedSequence(int.from_bytes(digest, "big"), pool_size=8)
    words = sequence.generate_state(_NUM_WORDS).astype(np.int64)
    words[0] = 0x80000000  # as MT19937's own seeding by an array does: the state is never all zero
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    state[_FIRST_WORD : _FIRST_WORD + 8 * _NUM_WORDS].view(torch.int64).copy_(torch.from_numpy(words))
    generator.set_state(state)
    return generator
