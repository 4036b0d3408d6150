# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import torch

from trl_distreward.generation import image_generators
from trl_distreward.seeds import keyed_generator


def test_no_two_of_many_streams_begin_alike():
    streams = [("rollout", 0), ("rollout", 1), ("reference", 0), ("evaluation", 0), ("forward", 0)]
    seeds = [*range(200), 2**32, 2**32 + 1, 2**40]
    starts = set()
    for seed in seeds:
        for stream, step in streams:
            for generator in image_generators(seed, stream, step, range(20)):
                starts.add(torch.randint(2**62, (1,), generator=generator).item())
    assert len(starts) == len(seeds) * len(streams) * 20


def test_a_key_always_gives_the_same_stream_whatever_its_parts_join_to():
    def draw(*key):
        return torch.randn(5, generator=keyed_generator(*key))

    assert torch.equal(draw(1, "noise", 23), draw(1, "noise", 23))
    keys = [(1, "noise", 23), (1, "noise", 2, 3), (1, "noise2", 3), ("1", "noise", 23)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)


def test_a_generator_draws_numbers_like_mt19937_with_the_same_state():
    generator = keyed_generator(0, "images")
    words = generator.get_state()[24 : 24 + 8 * 624].view(torch.int64).numpy().astype(np.uint32)
    twin = np.random.RandomState()
    twin.set_state(("MT19937", words, 624))
    drawn = torch.randint(2**31, (1000,), generator=generator)  # from the low half of two words each
    assert np.array_equal(drawn.numpy(), twin.randint(0, 2**32, 2000, dtype=np.uint32)[1::2] % 2**31)
