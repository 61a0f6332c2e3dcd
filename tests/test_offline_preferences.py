"""A policy learned from a preferences file: tokens, refusals, exact gradients, and accuracy that rises."""

import dataclasses
import json
import random

import pytest
import torch

import test_text
import tiny
from lossmith.api import train
from lossmith.cli import app
from lossmith.errors import FeedbackError, LossError, RecipeError
from lossmith.feedback.judgement import Judgement
from lossmith.feedback.output_set import OutputSet, named
from lossmith.feedback.preferences import Label, Pair, Ranking, Rating, write_preferences
from lossmith.feedback.store import Store
from lossmith.losses import get_loss
from lossmith.policy import token_outputs
from lossmith.rollouts import Distribution, LogProbs, Score
from lossmith.scorers.best_of_n import best_of, choose_best
from lossmith.training import Learner, Recipe
from lossmith.training.offline.examples import around_answer, judged_rollouts
from lossmith.training.offline.loop import (
    PreferenceRecipe,
    fit_loss,
    learn_preferences,
    open_preferences,
    plan_preferences,
)
from lossmith.training.offline.preference_scores import rows_of, verdict


def text(rng, letters):
    return "".join(rng.choice(letters) for _ in range(rng.randint(3, 7)))


def pairs(count=40, seed=0, **more):
    """Texts of a to e are preferred to texts of v to z."""
    rng = random.Random(seed)
    prompts = tiny.prompts(*(f"question {k}?" for k in range(count)))
    return [Pair(p, named(p, text(rng, "abcde")), named(p, text(rng, "vwxyz")), **more) for p in prompts]


def labels(count=40):
    return [Label(p.prompt, o, good) for p in pairs(count) for o, good in ((p.chosen, True), (p.rejected, False))]


def run(preferences, tmp_path, **fields):
    settings = dict(model=str(tiny.folder()), dtype="float32", device="cpu", runs=str(tmp_path), learning_rate=1e-3)
    settings |= dict(preferences_per_step=8, epochs=2, held_out=12, preferences=preferences)
    made = open_preferences(plan_preferences(PreferenceRecipe.make(**settings | fields)))
    steps = list(learn_preferences(made))
    made.finish()
    return made, steps


# -- the run ----------------------------------------------------------------------------------------------------------


SLOW = [
    pytest.param(loss, marks=pytest.mark.slow)
    for loss in ("ipo(beta=0.02)", "cpo", "slic", "cdpo", "ipo@trl", "dpo_hinge")
]


@pytest.mark.parametrize("loss", ["dpo", "simpo", "orpo", *SLOW])
def test_held_out_accuracy_rises(loss, tmp_path):
    settings = dict(learning_rate=5e-3, epochs=6) if "ref_logp" not in get_loss(loss.split("(")[0]).needs else {}
    made, steps = run(pairs(), tmp_path, loss=loss, **settings)
    held_out = made.summary["held_out"]
    assert held_out["after"]["accuracy"]["mean"] > 0.9 and held_out["difference"]["accuracy"]["ci95_low"] > 0
    assert held_out["before"]["accuracy"]["n"] == 12 and len(steps) in (8, 24)
    assert steps[-1].record["loss"] < steps[0].record["loss"]
    assert "rose" in verdict(made.summary)[0]


@pytest.mark.parametrize("form", ["labels", "pairs", "ratings"])
def test_kto_learns_from_whatever_is_good_or_bad(form, tmp_path):
    given = {"labels": labels(), "pairs": pairs()}
    given["ratings"] = [Rating(x.prompt, x.output, 5 if x.good else 2) for x in labels()]
    made, _ = run(given[form], tmp_path, loss="kto", preferences_per_step=8)
    assert made.summary["held_out"]["difference"]["accuracy"]["ci95_low"] > 0
    assert made.summary["held_out"]["after"]["accuracy"]["mean"] > 0.9
    assert "lam_d = 1, lam_u = 1" in made.notes[0]


def test_rankings_teach_their_whole_order(tmp_path):
    rng = random.Random(1)
    rankings = []
    for p in tiny.prompts(*(f"question {k}?" for k in range(40))):
        texts = [named(p, text(rng, letters)) for letters in ("abc", "mno", "mno", "xyz")]
        rankings.append(Ranking(p, ((texts[0],), (texts[1], texts[2]), (texts[3],))))
    made, _ = run(rankings, tmp_path, loss="dpo", epochs=3)
    assert made.train.pairs == 28 * 5 and made.train.examples[0].weight == 1 / 5
    assert made.learner.loss.to_dict()["labels"] == "given" and "share its weight" in made.notes[0]
    assert made.summary["held_out"]["difference"]["accuracy"]["ci95_low"] > 0


def test_the_folder_holds_what_a_run_holds(tmp_path, capsys):
    write_preferences(tmp_path / "pairs.jsonl", pairs())
    words = ["prefer", str(tmp_path / "pairs.jsonl"), "--model", str(tiny.folder()), "--dtype", "float32", "--json"]
    app([*words, "--runs", str(tmp_path), "--name", "one", "--learning-rate", "1e-3", "--loss", "dpo(beta=0.3)"],
        result_action="return_value")  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    folder = tmp_path / "one"
    assert said["folder"] == str(folder) and json.loads((folder / "summary.json").read_text())["loss"] == said["loss"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [0, 1]
    wanted = {"loss", "margin", "accuracy", "chosen_log_ratio", "rejected_log_ratio", "chosen_logp", "kl"}
    assert wanted < metrics[0].keys()
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-4) and metrics[0]["accuracy"] == pytest.approx(0.5, abs=0.5)
    again = PreferenceRecipe.make("recipe", **PreferenceRecipe.read(folder / "recipe.toml"))
    assert again.loss == "dpo(beta=0.3)" and (folder / "policy" / "model.safetensors").exists()


def test_the_preferred_text_that_becomes_less_likely_is_said(tmp_path):
    """The margin of DPO grows as well while both texts fall."""
    made, _ = run(pairs(), tmp_path, loss="dpo")
    change = made.summary["held_out"]["difference"]["chosen_logp"]
    change |= {"mean": -3.0, "ci95_high": -1.0}
    assert any("less likely (-3.00 nats" in sentence for sentence in verdict(made.summary))
    change |= {"mean": 3.0, "ci95_high": 4.0}
    assert len(verdict(made.summary)) == 1


def test_a_database_of_judgements_is_read(tmp_path):
    sets = [OutputSet(p.prompt, (p.rejected, p.chosen)) for p in pairs()]
    with Store(tmp_path / "j.db") as store:
        store.add_sets(sets)
        store.add(
            [Judgement(s.id, "pair", (s.outputs[1].id, s.outputs[0].id), "first", "ada", "pair") for s in sets[:-1]]
            + [Judgement(sets[-1].id, "pair", tuple(o.id for o in sets[-1].outputs), "tie", "ada", "pair")]
        )
    made, _ = run(str(tmp_path / "j.db"), tmp_path, loss="dpo")
    assert len(made.train.examples) == 27 and "1 ties" in made.notes[-1]
    assert made.summary["held_out"]["difference"]["accuracy"]["ci95_low"] > 0


@pytest.mark.slow
def test_micro_batches_change_nothing(tmp_path):
    for loss in ("dpo", "kto", "orpo"):
        found = []
        for budget in (4096, 30):
            made, steps = run(pairs(24), tmp_path, loss=loss, micro_batch_tokens=budget, epochs=1)
            found.append([step.record["loss"] for step in steps])
            found.append(made.summary["held_out"]["after"]["chosen_logp"])
        assert found[0] == pytest.approx(found[2], rel=1e-4) and found[1] == pytest.approx(found[3], rel=1e-4)


# -- exactly the online loss ------------------------------------------------------------------------------------------


def online_rollouts():
    generator = torch.Generator().manual_seed(3)
    measure = Distribution(0, dtype="float64")
    rollouts = tiny.rollouts(samples=2, measure=measure)
    values = torch.rand(len(rollouts), generator=generator).tolist()
    return [dataclasses.replace(r, score=Score(v)) for r, v in zip(rollouts, values, strict=True)]


def gradient(loss, rollouts, given=None):
    """d loss / d parameters through a policy that has moved off its reference, in float64."""
    policy = tiny.policy(tiny.llama(), torch.float64)
    made = Learner(policy, get_loss(loss), Recipe.make(temperature=1.0, allow_traps=True))
    with torch.no_grad():
        draw = torch.Generator().manual_seed(9)
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, dtype=p.dtype, generator=draw))
    batch = made.make_batch(rollouts, given)
    metrics = made.accumulate(rollouts, batch, made.loss.credit(batch))
    return metrics["loss"], torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize(("offline", "online"), [("dpo", "online_dpo"), ("ipo", "online_ipo"), ("kto", "kto")])
def test_given_pairs_have_the_gradient_of_sampled_ones(offline, online):
    sampled = online_rollouts()
    loss, wanted = gradient(online, sampled)
    unknown = [
        dataclasses.replace(
            r, behavior_logp=LogProbs(torch.full_like(r.behavior_logp.values, torch.nan), Distribution(0))
        )
        for r in sampled
    ]
    found, same = gradient(offline, unknown, {"group": torch.tensor([7, 7, 3, 3, 5, 5])})
    assert found == pytest.approx(loss, rel=1e-12) and float(wanted.abs().max()) > 1e-3
    torch.testing.assert_close(same, wanted, rtol=0, atol=1e-10)


def test_two_judgements_of_one_prompt_are_two_groups():
    """Annotators who disagree about a pair pull it both ways, and cancel at a policy equal to its reference."""
    p = tiny.prompts("Why?")[0]
    a, b = named(p, "aaa"), named(p, "zzzz")
    policy = tiny.policy(tiny.llama(), torch.float64)
    examples = judged_rollouts(policy, [Pair(p, a, b), Pair(p, b, a, annotator="eva")]).examples
    rollouts, given = rows_of(examples)
    assert given["group"].tolist() == [0, 0, 1, 1]
    made = Learner(policy, get_loss("dpo"), Recipe.make(temperature=1.0))
    batch = made.make_batch(rollouts, given)
    metrics = made.accumulate(rollouts, batch, made.loss.credit(batch))
    assert metrics["units"] == 2
    assert max(float(p.grad.abs().max()) for p in policy.parameters() if p.grad is not None) < 1e-12


def test_the_reference_point_of_kto_is_of_other_prompts_completions():
    rollouts = online_rollouts()
    policy = tiny.policy(tiny.llama(), torch.float64)
    made = Learner(policy, get_loss("kto"), Recipe.make(temperature=1.0))
    with torch.no_grad():
        policy.parameters()[0].add_(0.05)
    found = made.make_batch(rollouts).mismatched_log_ratio.tolist()
    settings = made.recipe.sampling
    for mine, value in zip(rollouts, found, strict=True):
        others = [r for r in rollouts if r.prompt.id != mine.prompt.id]
        swapped = [dataclasses.replace(r, prompt=mine.prompt, prompt_ids=mine.prompt_ids) for r in others]
        ours, theirs = (token_outputs(p, swapped, settings).logp.sum(1) for p in (policy, made.reference))
        assert min(abs(value - x) for x in (ours - theirs).tolist()) < 1e-10
    alone = made.make_batch(rollouts[:2]).mismatched_log_ratio
    assert alone.tolist() == [0, 0]  # no other prompt: no estimate


def test_what_needs_the_sampler_is_refused_with_the_reason():
    for name in ("grpo", "sppo(eta=1.0)", "gvpo"):
        with pytest.raises(RecipeError, match=r"anyone's texts.*lossmith train"):
            PreferenceRecipe.make(preferences=[], loss=name)
    with pytest.raises(RecipeError, match=r"needs Batch\.reference_reward"):
        PreferenceRecipe.make(preferences=[], loss="a2po")
    unknown = [
        dataclasses.replace(r, score=Score(1.0)) for r in judged_rollouts(tiny.loaded(), pairs(2)).examples[0].rollouts
    ]
    learner = Learner(tiny.loaded(), get_loss("dppo_square"), Recipe.make(temperature=1.0))
    with pytest.raises(LossError, match="behavior_logp"):
        tiny.update(learner, unknown)


def test_what_is_missing_is_said(tmp_path):
    def planned(source, **fields):
        return plan_preferences(PreferenceRecipe.make(preferences=source, model=str(tiny.folder()), **fields))

    with pytest.raises(FeedbackError, match=r"no preferences file '.*none\.jsonl'"):
        planned(str(tmp_path / "none.jsonl"))
    with pytest.raises(FeedbackError, match="no judgement file"):
        planned(str(tmp_path / "none.db"))
    with pytest.raises(RecipeError, match="the preferences: cannot hold out 40 of 4 prompts"):
        planned(pairs(4), held_out=40)
    with pytest.raises(RecipeError, match="an interval needs at least two"):
        planned(pairs(4), held_out=1)
    with pytest.raises(RecipeError, match=r"no setting 'lr'"):
        planned(pairs(4), lr=1)
    with pytest.raises(RecipeError, match="which preferences"):
        PreferenceRecipe.make()


# -- tokens -----------------------------------------------------------------------------------------------------------


def ids(policy, output):
    p = output if isinstance(output, Pair) else pair(output)
    return [r.completion_ids for r in judged_rollouts(policy, [p]).examples[0].rollouts]


def pair(chosen, rejected="no"):
    p = tiny.prompts("Why?")[0]
    return Pair(p, named(p, chosen), named(p, rejected))


def test_texts_end_the_assistants_turn_as_the_template_does():
    policy = tiny.loaded()
    assert around_answer(policy) == ("", 256)
    assert ids(policy, pair("yes"))[0] == (*policy.tokenizer("yes")["input_ids"], 256)
    rollout = judged_rollouts(policy, [pair("yes")]).examples[0].rollouts[0]
    assert rollout.prompt_ids == policy.encode(rollout.prompt) and rollout.finish_reason == "eos"
    assert policy.decode(rollout.completion_ids) == "yes" == rollout.completion
    assert rollout.behavior_logp.values.isnan().all()
    assert around_answer(tiny.policy(chat=False)) == ("", 256)


def test_a_special_token_spelled_out_is_text():
    policy = tiny.loaded()
    first = ids(policy, pair("stop " + tiny.END + " go on"))[0]
    assert first.count(256) == 1 and first[-1] == 256
    assert policy.decode(first) == "stop " + tiny.END + " go on"


def test_the_tokens_that_were_judged_are_those_that_are_trained():
    policy, p = tiny.loaded(), tiny.prompts("Why?")[0]
    tokens = policy.tokenizer("cut off")["input_ids"]  # without an end: the budget ended it
    foreign = Pair(p, named(p, "cut off", tokens), named(p, "other", [9999, 1]))
    found = judged_rollouts(policy, [foreign])
    first, second = found.examples[0].rollouts
    assert first.completion_ids == tuple(tokens) and first.finish_reason == "length"
    assert policy.decode(second.completion_ids) == "other"
    assert found.texts == {
        "with the tokens that were judged": 1,
        "whose recorded tokens are another tokenizer's, encoded anew": 1,
    }


def test_what_cannot_be_learned_from_is_refused_with_its_line(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [p.as_row() for p in pairs(10)]
    long = {"prompt": "Why?", "chosen": "a" * 300, "rejected": "b"}
    file.write_text("".join(json.dumps(r) + "\n" for r in [*rows, long]))
    for skip in (False, True):
        recipe = PreferenceRecipe.make(preferences=str(file), model=str(tiny.folder()), skip_bad=skip, held_out=2)
        plan = plan_preferences(recipe)
        every = plan.train + plan.held_out
        if skip:
            found = judged_rollouts(tiny.loaded(), every, skip_bad=True)
            assert found.left_out == {"too long for the context": 1} and "left out: 1 too long" in found.report()
        else:
            with pytest.raises(FeedbackError, match=r"pairs\.jsonl:11: .*301 tokens.*context is 256"):
                judged_rollouts(tiny.loaded(), every)


def test_two_sides_that_are_the_same_tokens_are_refused():
    p, policy = tiny.prompts("Why?")[0], tiny.loaded()
    same = policy.tokenizer("ab")["input_ids"]
    twice = Pair(p, named(p, "ab", [*same, 256]), named(p, "ab", [*same, 256], sample=1))
    with pytest.raises(FeedbackError, match="same tokens"):
        judged_rollouts(policy, [twice])


def test_forms_that_a_loss_cannot_read_are_refused():
    policy = tiny.loaded()
    examples = judged_rollouts(policy, [Label(x.prompt, x.output, x.good, str(k)) for k, x in enumerate(labels(4))])
    with pytest.raises(FeedbackError, match=r"no pair.*kto"):
        fit_loss(get_loss("dpo"), examples, examples)
    p = pairs(2)
    ranked = judged_rollouts(policy, [Ranking(x.prompt, ((x.chosen,), (x.rejected,))) for x in p])
    with pytest.raises(FeedbackError, match="only which are better"):
        fit_loss(get_loss("kto"), ranked, ranked)
    good = judged_rollouts(policy, [x for x in labels(4) if x.good])
    with pytest.raises(FeedbackError, match="nothing to tell apart"):
        fit_loss(get_loss("kto"), good, good)


@pytest.mark.parametrize(("good", "bad", "low", "high"), [(30, 10, 1, 4 / 3), (10, 30, 1, 4 / 3), (11, 10, 1.1, 1.1)])
def test_the_classes_of_kto_are_balanced_as_the_paper_asks(good, bad, low, high):
    policy, p = tiny.loaded(), tiny.prompts("Why?")[0]
    made = judged_rollouts(policy, [Label(p, named(p, f"t{k}"), k < good, str(k)) for k in range(good + bad)])
    loss, *_, notes = fit_loss(get_loss("kto"), made, made)
    term = loss.term
    weighed = term.lam_d * good / (term.lam_u * bad)
    assert low - 1e-9 <= weighed <= high + 1e-9 and min(term.lam_d, term.lam_u) == 1
    assert f"{good} good and {bad} bad" in notes[0]
    assert fit_loss(get_loss("kto"), made, made, balance=False)[0].term.lam_d == 1


def test_uncertain_pairs_are_read_as_such():
    policy = tiny.loaded()
    soft = judged_rollouts(policy, pairs(4, probability=0.7))
    loss, *_, notes = fit_loss(get_loss("dpo"), soft, soft)
    assert loss.to_dict()["labels"] == "given" and "4 uncertain pairs" in notes[0]
    given = rows_of(soft.examples)[1]["pair_probability"]
    assert given.tolist() == pytest.approx([0.7] * 8)
    sure = judged_rollouts(policy, pairs(4))
    assert fit_loss(get_loss("dpo"), sure, sure)[0].to_dict()["labels"] == "reward"


# -- online -----------------------------------------------------------------------------------------------------------


def vowels(prompts, completions, **columns):
    return [sum(c in "aeiou" for c in text) for text in completions]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "simpo", "best_of_n", "rejection_sampling(threshold=0.5)"])
def test_the_same_names_train_on_sampled_completions(loss, tmp_path):
    prompts = [f"question {k}?" for k in range(8)]
    made = train(
        quiet=True, model=str(tiny.folder()), prompts=prompts, scorer=vowels, loss=loss, steps=2, held_out=2,
        prompts_per_step=4, samples_per_prompt=4, max_tokens=12, runs=str(tmp_path), learning_rate=1e-3,
        temperature=1.0, allow_traps=True, dtype="float32",
    )  # fmt: skip
    lines = [json.loads(line) for line in (made.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and any(line["grad_norm"] > 0 for line in lines)


# -- best of n --------------------------------------------------------------------------------------------------------


class Scorer:
    name = "listed"

    def __init__(self, *scores):
        self.scores = scores

    def score(self, rollouts):
        return list(self.scores)


def test_best_of_n_takes_the_first_of_the_best_of_each_prompt():
    rollouts = tiny.rollouts()  # three prompts, three samples each
    ok, out, bad = Score, Score(abstained=True), Score(error="raised: no")
    found = best_of(Scorer(ok(1.0), ok(3.0), ok(3.0), out, ok(-2.0), bad, out, bad, bad), rollouts)
    assert [(r.prompt.id, r.sample) for r in found.rollouts] == [(rollouts[0].prompt.id, 1), (rollouts[3].prompt.id, 1)]
    assert [r.score.value for r in found.rollouts] == [3.0, -2.0]
    assert (found.abstained, found.failed, found.without, found.tied) == (2, 3, 1, 1)
    assert choose_best([]).rollouts == []


def test_best_of_n_is_the_largest_of_every_prompt():
    draw = torch.Generator().manual_seed(0)
    rollouts = [dataclasses.replace(r, score=Score(float(torch.rand((), generator=draw)))) for r in tiny.rollouts()]
    best = {r.prompt.id: r.score.value for r in choose_best(rollouts).rollouts}
    for r in rollouts:
        assert r.score.value <= best[r.prompt.id]


def test_tokens_are_those_of_a_text_whichever_special_tokens_were_shown():
    policy, p = tiny.loaded(), tiny.prompts("Why?")[0]
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokens = policy.tokenizer("<think>so")["input_ids"]
    for text in ("<think>so", "so"):
        found = judged_rollouts(policy, [Pair(p, named(p, text, tokens), named(p, "no"))])
        assert found.examples[0].rollouts[0].completion_ids == tuple(tokens)


def test_the_space_that_a_template_puts_before_an_answer_is_kept():
    policy = tiny.policy(tiny.llama(vocab=512))
    policy.tokenizer = test_text.space_tokenizer()
    assert around_answer(policy) == (" ", 2)
    first = ids(policy, pair("so it"))[0]
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "so it"}]
    whole = policy.tokenizer.apply_chat_template(said)["input_ids"]
    assert [*policy.encode(tiny.prompts("Why?")[0]), *first] == list(whole)
