# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import re

import pytest

from tests.docs_pages import PAGES, SOURCE, blocks, code_spans, prose
from tests.helpers import tiny_pipeline, tiny_reward, tiny_trainer


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.page.name}-{block.number}")
def test_code_of_the_docs_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {"__name__": "docs"})


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"local: (\w+)", (SOURCE / "_toctree.yml").read_text())
    assert sorted(listed) == sorted(path.stem for path in SOURCE.glob("*.md"))


def test_every_block_says_its_language():
    """Python is run, bash and YAML are parsed; text is what is printed, or cannot run here."""
    assert {block.language for block in blocks()} <= {"python", "bash", "yaml", "text"}


def test_nothing_is_code_by_its_indentation():
    """The built pages would show it as a paragraph."""
    for page in PAGES:
        if page.name != "api.md":  # where members of a class are indented
            assert not re.findall(r"^ {4}.*", prose(page), flags=re.MULTILINE), page


def test_documented_names_exist():
    import trl_distreward

    text = (SOURCE / "api.md").read_text()
    names = re.findall(r"\[\[autodoc\]\] ([\w.]+)", text)
    assert len(names) == len(set(names))
    for name in set(trl_distreward.__all__) - set(names):
        assert not callable(getattr(trl_distreward, name)) and f"`{name}`" in text, name
    for name in names:
        value = trl_distreward
        for part in name.split("."):
            value = getattr(value, part)
        assert value.__doc__, name


def test_no_page_has_a_place_left_to_fill():
    for page in PAGES:
        assert not re.findall(r"^[A-Z]+_(?:TABLE|TEXT)$|TODO|TBD", page.read_text(), flags=re.MULTILINE), page


def preferred(images, **kwargs):
    return images.float().flatten(1).mean(1)


def test_logged_names_are_logged(tmp_path):
    """What the pages call a log's values is what a run logs."""
    settings = {"log_reward_diagnostics": True, "log_steps": True, "beta": 0.1, "reference_refresh_steps": 1}
    trainer = tiny_trainer(tmp_path / "a", reward_funcs=[tiny_reward(), preferred], **settings)
    trainer.train()
    trainer.evaluate()
    logged = {name for entry in trainer.state.log_history for name in entry} | {"skipped_updates"}
    selected = tiny_trainer(tmp_path / "b", model=tiny_pipeline(), loss_type="rft", log_reward_diagnostics=True)
    selected.train()
    logged |= {name for entry in selected.state.log_history for name in entry}
    kinds = r"(?:ratio|reward_diagnostics|reward_placebo|rewards|reference_distance|seconds|delta_log_prob)/.*"
    kinds += r"|(?:eval_(?:sde|ode)_.*)|reward_std|clip_ratio|reference_drift|advantage_kept|delta_log_prob|kl"
    kinds += r"|grad_norm|skipped_updates|flow_matching_loss"
    mentioned = {
        span
        for page in ("quickstart", "troubleshooting", "choosing_a_reward", "paper_index")
        for span in code_spans(SOURCE / f"{page}.md")
        if re.fullmatch(kinds, span)
    }
    assert len(mentioned) > 20
    for name in mentioned:
        # "…" and "{name}" stand for anything; numbers of steps for others
        pattern = re.sub(r"…|\\\{name\\\}", ".+", re.escape(name))
        assert any(re.fullmatch(pattern, value) for value in logged), f"{name} is not among {sorted(logged)}"
