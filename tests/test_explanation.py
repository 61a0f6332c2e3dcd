"""Explanations: the chain of a token's numbers against autograd, and against what a run recorded and applied."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

import lossmith as ls
import shell
import tiny
from lossmith.explanation import explain
from lossmith.losses import CATALOGUE, Batch, example_loss
from lossmith.losses.catalogue.user import from_function
from lossmith.proofs.random_batches import evaluate, random_fields
from lossmith.replay import replay
from lossmith.report.explanation.page import explanation_page
from test_replay import jsonl, low_bytes, settings, trl_file

DRIFTS = (0.3, 1.5, 0.001)  # within and outside usual bounds, and around those of a few ten-thousandths


def product(term):
    """A term's pull, multiplied out again from the numbers that are shown."""
    own = math.prod(n.value for n in term.factors)
    return term.sum * term.share if term.shared else own


def numbers(token):
    return {n.name: n.value for n in token.credit}


# -- the catalogue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_chain_of_every_loss_multiplies_out_to_its_gradient(name):
    loss = example_loss(name)
    for seed, drift in enumerate(DRIFTS):
        fields = random_fields(loss, seed, drift)
        pulls = loss.anatomy(Batch(**fields)).pulls
        total = torch.zeros_like(fields["logp"])
        for pull in pulls:
            own = torch.ones_like(total)
            for factor in pull.factors:
                own = own * factor.value
            if pull.share is not None:
                own = (own * fields["mask"]).sum(1, keepdim=True) * pull.share
            total = total + own * fields["mask"]
        assert torch.allclose(total, -evaluate(loss, fields).gradients["logp"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in CATALOGUE if hasattr(example_loss(n), "advantage_scale")])
def test_the_way_from_score_to_advantage_adds_up(name):
    loss = example_loss(name)
    fields = random_fields(loss, 3)
    of = {link.name: link.value for link in loss.anatomy(Batch(**fields)).credit}
    if "before scaling" not in of:
        return
    mask = fields["mask"]
    scaled = (of["before scaling"] - of.get("shift", 0.0)) / of.get("divisor", 1.0) * of.get("factor", 1.0)
    if "bound" in of:
        scaled = scaled.clamp(-of["bound"], of["bound"])
    assert torch.allclose(scaled[mask], loss.credit(Batch(**fields)).advantage[mask], rtol=1e-12, atol=1e-12)
    if "baseline" in of and not loss.advantage.per_token:
        shaped = [value for name, value in of.items() if name == "score" or name.startswith("after ")][-1]
        assert torch.allclose((shaped - of["baseline"])[mask], of["before scaling"][mask], atol=1e-12)


def squares(batch, *, scale=0.5):
    """Half the square of every token's distance to the old policy."""
    return scale * ((batch.logp - batch.old_logp) ** 2).sum()


def test_a_function_of_ones_own_is_measured():
    loss = from_function(squares).build()  # not registered: the catalogue is that of every test
    fields = random_fields(loss, 0)
    (pull,) = loss.anatomy(Batch(**fields)).pulls
    assert pull.measured
    expected = torch.where(fields["mask"], fields["old_logp"] - fields["logp"], 0.0)
    assert torch.allclose(pull.value, expected, atol=1e-12)


def test_bounds_say_where_a_token_is_cut_off():
    loss = ls.get_loss("ppo_clip" if "ppo_clip" in CATALOGUE else "grpo", clip_low=0.2, clip_high=0.3)
    fields = random_fields(loss, 1, 0.5)
    moved = {link.name: link.value for link in loss.anatomy(Batch(**fields)).ratio}
    advantage = loss.credit(Batch(**fields)).advantage
    ratio = (fields["logp"] - fields["old_logp"]).exp()
    expected = torch.where(advantage > 0, ratio > 1.3, (advantage < 0) & (ratio < 0.8)) & (advantage != 0)
    seen = fields["mask"] & (advantage != 0)
    assert torch.equal(moved["cut off"].bool()[seen], expected[seen]) and bool(expected[seen].any())
    assert moved["lower bound"].unique().tolist() == [0.8] and moved["upper bound"].unique().tolist() == [1.3]


# -- a run ------------------------------------------------------------------------------------------------------------

LOSSES = ("grpo", "gspo", "dr_grpo", "ppo", "rloo(beta=0.1, kl_place='reward')", "dpo", "cispo(entropy_coef=0.01)")


@pytest.fixture(scope="module", params=LOSSES)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return ls.train(**settings(folder, loss=request.param, steps=2, max_grad_norm=1e9))


def everything(run, step):
    """The explanation of each completion of a step."""
    record = next(r for r in ls.read_recorded(run.folder.path) if r.step == step)
    prompts = list(dict.fromkeys(row.group for row in record.rows))
    where = [(prompts.index(row.group), row.sample) for row in record.rows]
    return record, [explain(run.folder.path, step=step, prompt=p, sample=s) for p, s in where]


def test_the_numbers_of_a_run_are_those_that_it_recorded_and_applied(run):
    record, found = everything(run, 1)
    pull = torch.zeros_like(record.fields["mask"], dtype=torch.float64)
    for i, one in enumerate(found):
        assert one.gap < 1e-9 and [t.id for t in one.tokens] == record.rows[i].tokens
        for t, token in enumerate(one.tokens):
            assert sum(map(product, token.terms)) == pytest.approx(token.pull, abs=1e-9)
            pull[i, t] = token.pull
            if "advantage" in numbers(token):
                assert numbers(token)["advantage"] == pytest.approx(float(record.advantage[i, t]), abs=1e-6)
    (mine,) = replay(record, [run.learner.loss]).losses
    assert torch.allclose(pull, mine.pull, rtol=0, atol=1e-9)


def test_the_pull_is_the_gradient_that_was_applied(tmp_path):
    run = ls.train(**settings(tmp_path, loss="grpo", steps=1, max_grad_norm=1e9))
    _, found = everything(run, 0)
    policy = tiny.loaded()
    rollouts = ls.read_rollouts(run.folder.path / "rollouts" / "step-00000.parquet")
    logp = ls.token_outputs(policy, rollouts, run.recipe.sampling).logp
    pull = torch.zeros_like(logp)
    for i, one in enumerate(found):
        pull[i, : len(one.tokens)] = torch.tensor([t.pull for t in one.tokens])
    (logp * pull).sum().backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(run.folder.metrics()[0]["grad_norm"], rel=1e-5)


def test_at_another_model_the_ratio_is_its_own_and_the_trust_region_acts(tmp_path):
    """As the run's learner saw it after its step: a plain forward pass of the saved policy against what was sampled."""
    run = ls.train(**settings(tmp_path, loss="grpo(clip_low=0.02, clip_high=0.02)", steps=1, learning_rate=3e-2))
    saved = ls.load_policy(run.folder.path / "policy", dtype="float32", device="cpu")
    rollouts = ls.read_rollouts(run.folder.path / "rollouts" / "step-00000.parquet")
    told, cut = [explain(run.folder.path, model=run.folder.path / "policy", prompt=0, sample=k) for k in range(4)], 0
    for one in told:
        assert one.gap < 1e-9 and str(run.folder.path / "policy") in one.notes[-1]
        (row,) = (r for r in rollouts if r.prompt.key == rollouts[0].prompt.key and r.sample == one.sample)
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        at = slice(len(row.prompt_ids) - 1, -1)
        with torch.no_grad():
            logps = (saved.model(input_ids=ids).logits[0, at] / run.recipe.temperature).log_softmax(-1)
        mine = logps.gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0]
        for token, logp, old in zip(one.tokens, mine.tolist(), row.behavior_logp.values.tolist(), strict=True):
            of = {n.name: n.value for n in (*token.ratio, *token.credit)}
            assert of["ratio"] == pytest.approx(math.exp(logp - old), rel=1e-4)
            out = of["ratio"] > 1.02 if of["advantage"] > 0 else of["ratio"] < 0.98
            pull = next(term.pull for term in token.terms if term.name == "policy")
            assert (pull == 0) == out or of["advantage"] == 0
            cut += out
    assert cut > 0


def test_tokens_have_their_texts_and_the_group_its_scores(tmp_path):
    run = ls.train(**settings(tmp_path, loss="grpo", steps=1))
    record, found = everything(run, 0)
    for one, row in zip(found, record.rows, strict=True):
        assert "".join(t.text for t in one.tokens).startswith(row.completion)
        assert [m.sample for m in one.group] == [0, 1, 2, 3] and sum(m.this for m in one.group) == 1
        assert one.group[one.sample].score == float(record.fields["reward"][record.rows.index(row)])
        mean = sum(m.score for m in one.group) / 4
        assert numbers(one.tokens[0])["baseline"] == pytest.approx(mean)


def test_an_adaptive_kl_coefficient_is_that_of_the_step(tmp_path):
    loss = "grpo(beta=0.05, kl_control='adaptive', kl_control_target=1e-6, kl_horizon=20)"
    run = ls.train(**settings(tmp_path, loss=loss, steps=3, learning_rate=1e-2))
    used = [line["kl_coefficient"] for line in run.folder.metrics()]
    assert len(set(used)) > 1
    for step, beta in enumerate(used):
        kl = next(t for t in explain(run.folder.path, step=step).tokens[0].terms if t.name == "kl")
        assert kl.factors[0].value == pytest.approx(-beta)


def test_several_updates_of_a_step_are_said(tmp_path):
    run = ls.train(**settings(tmp_path, loss="grpo", steps=1, updates_per_step=2))
    assert "the run made 2 updates of this step" in explain(run.folder.path).notes[-1]
    assert explain(run.folder.path, loss="grpo").notes == ()


# -- what it says -----------------------------------------------------------------------------------------------------


def lines(*scores, **more):
    row = {"prompt_tokens": [1], "response_tokens": [3, 4], "logprobs": [-1.0, -2.0], "prompt_idx": 0, "advantage": 0.0}
    return [row | {"reward": score} | more for score in scores]


def said(tmp_path, *scores, loss="dr_grpo", sample=0, **more):
    return explain(jsonl(tmp_path / "r.jsonl", *lines(*scores, **more)), loss=loss, sample=sample)


def test_a_completion_below_its_group_is_pushed_down_and_says_by_how_much(tmp_path):
    one = said(tmp_path, 0.4, 0.8)
    assert one.sentence == "Pushed down, because its completion scored 0.2 below its group's mean of 0.6."
    assert one.tokens[1].sentence == (
        "Pushed down by 0.05, because its completion scored 0.2 below its group's mean of 0.6."
    )
    assert [t.pull for t in one.tokens] == pytest.approx([-0.05, -0.05])  # 0.2 / (2 completions · 2 tokens)
    assert said(tmp_path, 0.8, 0.4).sentence.startswith("Pushed up, because its completion scored 0.2 above")


def test_a_group_of_equal_scores_says_that_nothing_can_be_told_apart(tmp_path):
    one = said(tmp_path, 0.5, 0.5)
    assert one.sentence == (
        "Not pushed, because all 2 completions of its prompt scored 0.5: there is nothing to tell apart."
    )
    assert all(t.pull == 0 for t in one.tokens)


def test_a_scale_is_named_with_its_number(tmp_path):
    assert said(tmp_path, 0.4, 0.8, loss="grpo(beta=0)").sentence.endswith(
        "mean of 0.6: an advantage of −0.707, once divided by the standard deviation of its group's scores (0.283)."
    )


def test_a_completion_that_is_left_out_says_why(tmp_path):
    one = said(tmp_path, 0.4, 0.8, loss="dr_grpo(truncated='mask')", finish_reason="length")
    assert "left out of the loss (cut off by the token budget" in one.tokens[0].sentence


def test_a_whole_completion_loss_tells_what_the_others_scored(tmp_path):
    one = said(tmp_path, 0.4, 0.8, loss="online_dpo_no_ref" if "online_dpo_no_ref" in CATALOGUE else "simpo")
    assert one.sentence == (
        "Pushed down, because the loss falls as this completion becomes less likely: it scored 0.4, the others of its "
        "prompt 0.8."
    )


# -- other trainers ---------------------------------------------------------------------------------------------------


def test_of_a_file_without_log_probabilities_only_what_hangs_on_them_is_unknown(tmp_path):
    trl_file(tmp_path, 1)
    one = explain(tmp_path, loss="grpo@trl", prompt="a", sample=0)
    token = one.tokens[0]
    assert one.unknown == ("old_logp",) and token.pull > 0
    assert token.policies[0].name == "logp" and token.policies[0].value is None
    assert {n.name: n.value for n in token.ratio}["ratio"] == 1  # whatever log p is: the update begins there
    assert "".join(t.text for t in one.tokens) == "xx"
    two = explain(tmp_path, loss="grpo", prompt="a", sample=0)
    assert two.unknown == ("old_logp", "ref_logp") and "without its KL term" in two.notes[-1]


def test_a_pull_that_hangs_on_unrecorded_log_probabilities_is_not_shown(tmp_path):
    trl_file(tmp_path, 1)
    one = explain(tmp_path, loss="simpo", prompt="a", sample=0)
    assert one.pull is None and one.gap is None and one.tokens[0].pull is None
    assert one.sentence == "Which way it was pushed depends on what the file does not hold."


def test_recorded_advantages_are_taken_where_rewards_are_not_recorded(tmp_path):
    line = {
        "token_ids": [1, 2, 3], "loss_mask": [False, True, True], "advantages": [0.0, 0.5, 0.5],
        "inference_logprobs": [0.0, -1.0, -0.5], "trainer_logprobs": [0.0, -1.1, -0.4], "entropy": [0.0, 1.0, 1.0],
    }  # fmt: skip
    file = jsonl(tmp_path / "rank_0.jsonl", line, line | {"advantages": [0.0, -1.0, -1.0]})
    one = explain(file, loss="grpo@trl", prompt=1)
    assert one.sentence == "Pushed down, because its advantage is −1 (A, as given)."
    assert [t.text for t in one.tokens] == ["[2]", "[3]"] and [t.pull for t in one.tokens] == [-0.25, -0.25]


# -- what is refused, and the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "no recipe.toml that says with which loss"),
        ({"loss": "grpo@trl", "step": 9}, "there is no step 9: recorded are 1"),
        ({"loss": "grpo@trl", "prompt": 7}, "there is no prompt 7: step 1 has 2, counted from 0"),
        ({"loss": "grpo@trl", "prompt": "zebra"}, "no prompt of step 1 match 'zebra'"),
        ({"loss": "grpo@trl", "sample": 1}, "sample 1 of which prompt"),
        ({"loss": "grpo@trl", "prompt": 0, "sample": 5}, "has no sample 5: recorded are 0, 1"),
        ({"loss": "gae"}, "."),
        ({"loss": "dpo"}, "it reads ref_logp, which the file does not hold"),
    ],
)
def test_what_cannot_be_explained_is_said(tmp_path, asked, words):
    trl_file(tmp_path, 1)
    with pytest.raises(ls.LossmithError) as error:
        explain(tmp_path, **asked)
    assert words in str(error.value)


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(tmp_path):
    hostile = "</script><script>alert(1)</script><img src=//e.x/>"
    lines = [{"text": hostile, "points": 1, "q": hostile}, {"text": "b", "points": 0, "q": hostile}]
    mapping = {"completion": "text", "reward": "points", "group": "q", "prompt": "q"}
    one = explain(jsonl(tmp_path / "r.jsonl", *lines), loss="grpo(beta=0)", sample=0, mapping=mapping)
    page = explanation_page(one)
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page
    assert not re.search(r"(src|href)=.?(https?:|//)|url\(|@import", page.replace("src=//e.x/", ""))
    data = json.loads(re.search(r'id="numbers">(.*?)</script>', page, re.S)[1])
    titles = [section["title"] for section in data["sections"]]
    for token, shown in zip(one.tokens, data["tokens"], strict=True):
        assert shown["values"][titles.index("Together")] == [token.pull] and shown["sentence"] == token.sentence


def test_the_command_shows_completion_group_and_chain(tmp_path):
    run = ls.train(**settings(tmp_path, loss="grpo", steps=1, scorer=low_bytes))
    shown = shell.lossmith("explain", run.folder.path, "--prompt", 0, "--sample", 2, "--token", 1).stdout
    assert "step 0, prompt 0 of 2, sample 2, through grpo" in shown
    assert "▸ 2" in shown and "its group's mean" in shown and "pull −dL/dlogp" in shown and "[" in shown
    found = json.loads(shell.lossmith("explain", run.folder.path, "--json").stdout)
    page = tmp_path / "why.html"
    assert f"wrote {page}" in shell.lossmith("explain", run.folder.path, "--html", page).stdout and page.is_file()
    assert len(found["tokens"]) and found["tokens"][0]["terms"][0]["name"] == "policy"
    refused = shell.lossmith("explain", run.folder.path, "--token", 99, code=2).stderr
    assert "--token 99: the completion has the tokens 0 to" in refused
