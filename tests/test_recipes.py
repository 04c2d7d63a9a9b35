"""The shipped recipes: each is what it says, in both presets and stages, and fits the GPUs it names."""

from __future__ import annotations

import re

import pytest

from rethinker.config import ConfigError
from rethinker.plan.build import Machine, make_plan
from rethinker.settings import presets, resolve_config, shipped_recipes
from tests.plan.published import write

# Recipe, GPUs, GiB of each: as the recipe's first lines and the docs say.
SCALES = {
    "qwen2_5_vl_3b": (1, 141),
    "qwen2_5_vl_7b": (8, 80),
    "qwen2_5_vl_32b": (32, 80),
    "qwen2_5_vl_72b": (64, 80),
    "qwen3_vl_8b": (8, 80),
    "qwen3_vl_30b_a3b": (16, 80),
    "qwen3_5_9b": (8, 80),
}
# Presets of a published method, whose formulas are held in tests/algorithm/test_formulas.py.
METHODS = {"dapo", "dr_grpo", "gspo", "cispo", "sapo", "gmpo", "rloo", "reinforce_pp"}


def test_every_recipe_is_listed():
    """A new recipe joins the table above, and with it these tests."""
    assert set(SCALES) == {name for name in shipped_recipes() if "_cpu" not in name}
    assert set(presets()) == {"virl39k", "released_code", "stage2", "offload", "zeropp"} | METHODS


@pytest.mark.parametrize("name", SCALES)
def test_paper_and_released_code_in_both_stages(name):
    """The paper's set-up is in every recipe; the presets change what METHOD's sources say they change, and no more."""
    paper = resolve_config(name)
    assert (paper.rollout.group_size, paper.train.episode_queries, paper.train.batch_pairs) == (8, 1024, 512)
    assert (paper.train.learning_rate, paper.train.schedule, paper.train.warmup_ratio) == (1e-6, "cosine", 0.03)
    assert (paper.train.betas, paper.train.weight_decay, paper.train.epochs) == ((0.9, 0.95), 0.0, 3.0)
    assert (paper.algorithm.name, paper.algorithm.kl_coef, paper.rollout.temperature) == ("ssr", 0.0, 1.0)
    assert (paper.data.max_prompt_tokens, paper.rollout.max_new_tokens, paper.data.max_images) == (2048, 2048, 8)
    assert (paper.algorithm.clip_high, paper.algorithm.advantage_scale, paper.rethink.fraction) == (0.2, "std", 0.0)
    assert (paper.policy.dtype, paper.algorithm.rollout_correction) == ("bfloat16", "token_truncate")
    code = resolve_config(f"{name}+released_code")
    assert (code.algorithm.clip_low, code.algorithm.clip_high, code.algorithm.advantage_scale) == (0.2, 0.35, "none")
    second = resolve_config(f"{name}+stage2")
    assert second.rethink.fraction > 0 and second.rethink.preset == "paper" and paper.data.prompt != second.data.prompt
    assert "**regularly perform self-questioning, self-verification, self-correction" in second.data.prompt
    both = resolve_config(f"{name}+released_code+stage2")
    assert both.rethink.preset == "released_code" and both.algorithm.clip_high == 0.35
    assert both.policy.model == paper.policy.model and both.data.prompt == second.data.prompt
    assert re.fullmatch(rf"{name}-released_code-stage2-\d{{8}}-\d{{6}}", both.run.name)


@pytest.mark.parametrize("recipe", shipped_recipes())
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_goes_with_every_recipe(recipe, method):
    """A method's preset resolves and passes its checks on each recipe, changes the algorithm alone (DAPO's the rewards,
    too), and a setting that is given still wins."""
    plain, config = resolve_config(recipe), resolve_config(f"{recipe}+{method}", {"algorithm.clip_low": 0.11})
    assert config.algorithm != plain.algorithm and config.algorithm.clip_low == 0.11
    config.algorithm, config.run.name = plain.algorithm, plain.run.name
    if method == "dapo":
        assert [entry["function"] for entry in config.reward.functions] == ["boxed", "overlong"]
        config.reward = plain.reward
    assert config == plain


@pytest.mark.parametrize("name", SCALES)
def test_it_fits_the_gpus_it_names(name, tmp_path):
    """`rethinker plan` says so, for the first stage; the second differs in its prompt alone."""
    gpus, memory = SCALES[name]
    model = write(resolve_config(name).policy.model, tmp_path)
    assert not make_plan(resolve_config(name, {"policy.model": model}), Machine(gpus, memory * 2**30)).problems


def test_parts_that_do_not_exist(tmp_path, monkeypatch):
    """A preset is no recipe; an unknown part is named with what there is; a file's own base must be a preset."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no recipe named 'stage2': give a shipped one"):
        resolve_config("stage2")
    with pytest.raises(ConfigError, match=r"no recipe named 'stage3': give a shipped one \(cispo, dapo, "):
        resolve_config("qwen2_5_vl_7b+stage3")
    (tmp_path / "mine.yaml").write_text("base: stage9\n")
    with pytest.raises(ConfigError, match="base='stage9' must be one of cispo, dapo, dr_grpo, gmpo, gspo, "):
        resolve_config("mine.yaml")
    (tmp_path / "mine.yaml").write_text("base: virl39k\npolicy: {model: /m}\n")
    config = resolve_config("mine.yaml+stage2")
    assert config.policy.model == "/m" and config.data.fields["id"] == "qid" and config.rethink.fraction > 0
