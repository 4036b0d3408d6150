# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What happened on the way: rewards, updates, cost, and everything that was logged."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .charts import SAME, Series, line_chart, number, share_bar
from .folder import Run
from .html import Markup, details, paragraph, section, setting, table


@dataclass(frozen=True)
class Chart:
    """Logged names that share a chart, each with what its line is called."""

    title: str
    lines: Sequence[tuple[str, str]]
    note: str = ""
    shown: Callable[[float], float] = lambda value: value


_DRIFT_NOTE = (
    "How far the mean reward is from what the unchanged reference set would get, in standard deviations of rewards."
)
_SHARE_NOTE = (
    "Variance of a subset's reward over other places for the same images, as a share of the variance over subsets. It "
    "is noise; what is left to 1 is the images' doing."
)
_REWARD = (
    Chart("Drift from the reference set", (("reference_drift", "drift"),), _DRIFT_NOTE),
    Chart(
        "Share of the spread that is noise",
        (("reward_diagnostics/placement_share", "policy"), ("reward_placebo/placement_share", "new reference set")),
        _SHARE_NOTE,
    ),
    Chart(
        "Signal to noise of the reward",
        (("reward_diagnostics/signal_to_noise", "policy"), ("reward_placebo/signal_to_noise", "new reference set")),
        "The variance that is the images' doing, over the noise's.",
    ),
    Chart(
        "Mean reward against the unchanged set",
        (("reward_diagnostics/drift", "policy"), ("reward_placebo/drift", "new reference set")),
        "In standard deviations over subsets; with a new reference set it is a placebo, 0 on average.",
    ),
    Chart("Share of images trained on", (("advantage_kept", "share"),)),
    Chart("Share of candidates with finite images", (("finite_candidates", "share"),)),
)
_UPDATE = (
    Chart("Loss", (("loss", "loss"),)),
    Chart("Gradient norm, before clipping", (("grad_norm", "norm"),)),
    Chart("Learning rate", (("learning_rate", "rate"),)),
    Chart(
        "Probability ratio, less 1",
        (("ratio/max", "highest"), ("ratio/mean", "mean"), ("ratio/min", "lowest")),
        "Between replay and rollout; at the first update from a generation it is 0.",
        lambda value: value - 1,
    ),
    Chart("Change of log-probability, rollout to replay", (("delta_log_prob", "|Δ log p|"),)),
    Chart("Share of clipped pairs", (("clip_ratio", "share"),)),
    Chart("Divergence from the initial model", (("kl", "KL"),)),
)


def _charts(run: Run, charts: Sequence[Chart], used: set[str]) -> str:
    """Those of which something was logged; what never changes is told in a line."""
    drawn, constant = [], []
    for chart in charts:
        series = []
        for key, name in chart.lines:
            points = [(x, chart.shown(y)) for x, y in run.series(key)]
            if points:
                used.add(key)
                series.append(Series(name, points))
        values = [y for line in series for _, y in line.points]
        if values and math.isfinite(values[0]) and all(math.isclose(y, values[0], rel_tol=SAME) for y in values):
            constant.append(f"{chart.title}: {number(values[0])} throughout.")
        elif series:
            drawn.append(line_chart(chart.title, series, run.images_by_step, chart.note))
    return f'<div class="charts">{"".join(drawn)}</div>{paragraph(" ".join(constant), "faint")}'


def reward_section(run: Run, used: set[str]) -> str:
    stds, parts = dict(run.series("reward_std")), []
    points = run.series("reward")
    band = [(x, y - stds[x], y + stds[x]) for x, y in points if x in stds]
    lines = [Series("mean", points, band)]
    best = run.series("reward_best")
    if best:
        lines.append(Series("best", best))
    used.update(("reward", "reward_std", "reward_best"))
    note = "The band is one standard deviation over subsets, or candidates." if band else ""
    parts.append(line_chart("Reward", lines, run.images_by_step, note))
    for key in run.logged:
        if key.startswith("rewards/") and key.endswith("/mean"):
            name = key.removeprefix("rewards/").removesuffix("/mean")
            spread = dict(run.series(f"rewards/{name}/std"))
            own = run.series(key)
            own_band = [(x, y - spread[x], y + spread[x]) for x, y in own if x in spread]
            parts.append(line_chart(f"Reward {name}", [Series("mean", own, own_band)], run.images_by_step))
            used.update((key, f"rewards/{name}/std"))
    spaces = [key for key in run.logged if key.startswith("reference_distance/")]
    for space in spaces:  # each in units of its own
        name = space.removeprefix("reference_distance/")
        title = f"Distance of the reference set, {name}"
        parts.append(line_chart(title, [Series(name, run.series(space))], run.images_by_step))
        used.add(space)
    charts = f'<div class="charts">{"".join(parts)}</div>' if any(parts) else ""
    rewards = run.record.get("rewards") or {}
    named = ", ".join(f"{name} (weight {weight:g})" for name, weight in rewards.items())
    diagnosed = any(key.startswith(("reward_diagnostics/", "reward_placebo/")) for key in run.logged)
    hint = "How much of the spread is the images' doing is logged with log_reward_diagnostics=True."
    distributional = run.record["trainer"] == "DistributionRewardTrainer"
    return section(
        "Reward",
        paragraph(f"{f'Reward: {named}. ' if named else ''}{_averaged(run)}"),
        charts,
        _charts(run, _REWARD, used),
        paragraph(hint if distributional and not diagnosed else "", "note"),
    )


def _averaged(run: Run) -> str:
    every = run.settings.get("logging_steps", 1)
    return (
        f"Each point is a mean over the {every} updates before it, or those since the last log." if every > 1 else ""
    )


def update_section(run: Run, used: set[str]) -> str:
    used.add("skipped_updates")
    skipped = run.record.get("skipped", [])
    told = f"{len(skipped)} updates were skipped." if skipped else "No update was skipped."
    if not run.recorded:
        count = sum(value > 0 for _, value in run.series("skipped_updates"))
        told = f"Updates were skipped before {count} logs." if count else "No update was skipped."
    listed = table(("after update", "reason"), [(s["step"], s["reason"]) for s in skipped], numbers=(0,))
    return section("Updates", _charts(run, _UPDATE, used), paragraph(told), details("Skipped updates", listed))


def cost_section(run: Run, used: set[str]) -> str:
    used.update(key for key in run.logged if key.startswith("seconds/"))
    seconds, images = dict(run.record.get("seconds", {})), run.record.get("images", {})
    total = run.record.get("total_seconds")
    if not seconds or not total:
        return section("Cost", paragraph("Nothing of the run's cost is recorded.")) if not run.recorded else ""
    rest = total - sum(seconds.values())
    if rest > 0:
        seconds["everything else"] = rest
    ordered = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    rows: list[tuple[Any, ...]] = []
    for index, (phase, value) in enumerate(ordered.items()):
        swatch = (
            f'<svg class="swatch p{index % 8}" viewBox="0 0 1 1" aria-hidden="true"><rect width="1" height="1"/></svg>'
        )
        made = images.get(phase)
        each = number(1000 * value / made, 3) if made else "\N{EN DASH}"
        share = f"{100 * value / sum(ordered.values()):.1f} %"
        name = Markup(f"{swatch}{setting(phase).text}")
        rows.append((name, duration(value), share, made if made else "\N{EN DASH}", each))
    rows.append(("together", duration(sum(ordered.values())), "100 %", sum(images.values()), "\N{EN DASH}"))
    return section(
        "Cost",
        share_bar(ordered),
        table(("phase", "time", "share", "images", "ms per image"), rows),
        paragraph(
            "Time on the main process. Of a run that was resumed, what was done after the checkpoint and lost is not "
            "counted.",
            "note",
        ),
    )


def duration(seconds: float) -> str:
    """`850 ms`, `12.3 s`, `5 min 12 s`, `3 h 05 min`."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def logged_section(run: Run, used: set[str]) -> str:
    """What no chart shows."""
    rows = []
    for key in run.logged:
        values = [y for _, y in run.series(key)]
        if key in used or key in ("step", "epoch", "num_images") or key.startswith("coefficients/") or not values:
            continue
        finite = [value for value in values if math.isfinite(value)]
        ends = (min(finite), max(finite)) if finite else ("\N{EN DASH}",) * 2
        rows.append((setting(key), len(values), values[0], values[-1], *ends))
    shown = table(("name", "logs", "first", "last", "lowest", "highest"), rows)
    return details(f"Everything else that was logged ({len(rows)})", shown)
