# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from trl_distreward.trainer.estimators.pairs import Deal, PairBatch

TIMES, STEPS = [1.0, 0.7, 0.4, 0.0], [0, 2]


def dealt(deal, rank, size, num_images):
    """The batch of one process. Every number tells which image it comes from."""
    ids = torch.arange(rank * size, (rank + 1) * size, dtype=torch.float32)
    return PairBatch(
        cond={"class_labels": deal(ids.long())},
        states={i: deal(ids[:, None] + 1000 * i) for i in (0, 1, 2, 3)},
        steps=STEPS,
        grid=torch.tensor(TIMES, dtype=torch.float64),
        log_probs=deal(ids[:, None] + torch.tensor([0.0, 0.5])),
        advantages=deal.mine / 7,
        step_weights=torch.tensor([0.5, 1.5]),
        num_own=deal.num_own,
        num_images=num_images,
    )


def deal_over(processes, size, kept):
    """Deals on every process, in threads that meet where processes would."""
    barrier, sent = threading.Barrier(processes), [None] * processes

    def work(rank):
        def gather(values):
            sent[rank] = values
            barrier.wait(10)
            everything = torch.cat(sent)
            barrier.wait(10)
            return everything

        accelerator = SimpleNamespace(gather=gather, process_index=rank, num_processes=processes)
        return dealt(Deal(torch.tensor(kept), size, accelerator), rank, size, len(kept))

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(work, range(processes)))


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(("processes", "kept"), [(1, [1, 4, 5]), (3, [7]), (3, [2, 3, 4, 9, 11])])
def test_micro_batches_cover_every_pair_once_and_are_equally_many_on_all_processes(processes, kept, size):
    batches = deal_over(processes, 4 if processes > 1 else 6, kept)
    per_process = [list(batch.micro_batches(size, processes)) for batch in batches]
    assert len({len(micros) for micros in per_process}) == 1  # no process waits for one that has finished
    counts = [batch.num_own for batch in batches]
    assert max(counts) - min(counts) <= 1 and sum(counts) == len(kept)
    seen, total = [], 0.0
    for micros in per_process:
        assert [is_last for _, is_last in micros] == [False] * (len(micros) - 1) + [True]
        for micro, _ in micros:
            total += micro["weights"].sum().item()
            for row in (micro["weights"] > 0).nonzero().flatten().tolist():
                image = micro["cond"]["class_labels"][row].item()
                step = TIMES.index(micro["t"][row].item())
                assert micro["x"][row, 0] == image + 1000 * step
                assert micro["next_x"][row, 0] == image + 1000 * (step + 1)
                assert micro["t_next"][row].item() == TIMES[step + 1]
                assert micro["log_probs"][row] == image + (0.5 if step == 2 else 0.0)
                assert micro["advantages"][row].item() == pytest.approx(image / 7)
                assert micro["weights"][row].item() == pytest.approx((0.5, 1.5)[step // 2] / (2 * len(kept)))
                seen.append((image, step))
    assert sorted(seen) == [(image, step) for image in kept for step in STEPS]
    assert total == pytest.approx(1.0)
