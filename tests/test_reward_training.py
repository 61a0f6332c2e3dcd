"""Reward models: what they learn from simulated annotators, what they are asked about, and that they stay frozen."""

import dataclasses
import json
import os
import random
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from lossmith.errors import FeedbackError, RecipeError, RunError, ScorerError
from lossmith.feedback.output_set import named
from lossmith.feedback.preferences import Label, Pair, Ranking, Rating, write_preferences
from lossmith.prompts import Prompt
from lossmith.reward_model.evaluate import measure
from lossmith.reward_model.fit import accumulate, loss_of
from lossmith.reward_model.model import load_scoring
from lossmith.reward_model.scored_texts import ScoredTexts, make_scored_texts
from lossmith.reward_model.train import RewardRecipe, train_reward_model
from lossmith.rollouts import Rollout, Score
from lossmith.scorers import load_scorer, score_rollouts
from lossmith.scorers.combine import Ensemble
from lossmith.scorers.reward_model import RewardModel
from lossmith.scorers.seal import Seal

SMALL = dict(model=str(tiny.folder()), device="cpu", dtype="float32", epochs=10, learning_rate=5e-3)


def utility(text):
    """What the simulated annotators like: letters a and b."""
    return text.count("a") + text.count("b")


def texts(rng, count):
    found = set()
    while len({utility(x) for x in found}) < count:
        found.add("".join(rng.choice("abcdefgh") for _ in range(8)))
    return sorted({utility(x): x for x in sorted(found)}.values())[:count]


FAIR, HARSH, GENEROUS = (0.0, 1.0), (-1.0, 0.5), (5.0, 1.0)  # offset, scale


def judged(form, prompts=60, seed=0, annotators=(FAIR, FAIR)):
    """Two annotators: one sees the better two of three outputs, the other the worse two.

    A rating is offset + scale · utility; a comparison is the same whatever offset and scale.
    """
    rng, made = random.Random(seed), []
    for i in range(prompts):
        prompt = Prompt(f"Question {i}?")
        outputs = [named(prompt, x) for x in texts(rng, 3)]
        best_first = sorted(outputs, key=lambda o: -utility(o.text))
        if form == "pairs":
            made += [Pair(prompt, best_first[a], best_first[b]) for a, b in ((0, 1), (1, 2))]
        elif form == "rankings":
            made.append(Ranking(prompt, tuple((o,) for o in best_first)))
        elif form == "ratings":
            for (offset, scale), seen in zip(annotators, (best_first[:2], best_first[1:]), strict=True):
                made += [Rating(prompt, o, offset + scale * utility(o.text), -5.0, 15.0) for o in seen]
        else:
            made += [Label(prompt, o, utility(o.text) > 2) for o in outputs]
    return made


def train(tmp_path, preferences, **changes):
    write_preferences(tmp_path / "p.jsonl", preferences)
    lines = []
    manifest = train_reward_model(tmp_path / "p.jsonl", tmp_path / "RM", RewardRecipe(**SMALL | changes), lines.append)
    return manifest, lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm")
    return folder, *train(folder, judged("pairs"))


def rollout(prompt, text):
    return dataclasses.replace(tiny.rollouts()[0], prompt=prompt, completion=text)


# -- what is learned --------------------------------------------------------------------------------------------------


SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in ("rankings", "labels")]


@pytest.mark.parametrize("form", ["pairs", "ratings", *SLOW])
def test_the_order_is_recovered_from_every_form(tmp_path, form):
    manifest, lines = train(tmp_path, judged(form))
    accuracy = manifest["held_out"]["accuracy"]
    assert accuracy["mean"] > 0.9 and accuracy["ci95_low"] > 0.6 and accuracy["ci95_high"] > accuracy["ci95_low"]
    assert manifest["loss"] in lines[0] and "held-out accuracy" in lines[-1]


@pytest.mark.slow
def test_annotators_who_use_the_scale_differently_spoil_ratings_but_not_rankings(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    fair, _ = train(tmp_path / "a", judged("ratings"))
    spoilt, _ = train(tmp_path / "b", judged("ratings", annotators=(HARSH, GENEROUS)))
    ranked, _ = train(tmp_path / "c", judged("pairs", annotators=(HARSH, GENEROUS)))
    figures = [m["held_out"]["accuracy"]["mean"] for m in (fair, spoilt, ranked)]
    # held-out accuracy of ratings is against the ratings themselves: what counts is the order of utility
    orders = [order_kept(tmp_path / name / "RM") for name in ("a", "b", "c")]
    assert figures[2] > 0.9 and orders[0] > 0.9 and orders[2] > 0.9 and orders[1] < orders[0] - 0.2


def order_kept(folder):
    """Share of pairs of fresh texts that a model orders as utility does."""
    rng, right = random.Random(7), []
    scorer = load_scorer(str(folder))
    for i in range(20):
        rows = [rollout(Prompt(f"Question {60 + i}?"), x) for x in sorted(texts(rng, 3), key=utility)]
        values = [s.value for s in scorer.score(rows)]
        right += [values[a] < values[b] for a, b in ((0, 1), (1, 2))]
    return sum(right) / len(right)


def test_no_prompt_is_on_both_sides(trained):
    _, manifest, _ = trained
    data = manifest["data"]
    assert data["train"] + data["held_out"] == 120 and data["held_out"] == 24  # two pairs of each of 12 prompts


# -- what it is asked about -------------------------------------------------------------------------------------------


def test_scores_of_the_saved_folder_are_those_of_training(trained):
    """And the folder is an ordinary one: transformers alone gives the same number at the true last token."""
    folder, manifest, _ = trained
    prompt, text = Prompt("Question 3?"), "aab"
    (scored,) = score_rollouts(load_scorer(str(folder / "RM")), [rollout(prompt, text)])
    tokenizer = AutoTokenizer.from_pretrained(folder / "RM")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "RM").eval()
    said = [{"role": "user", "content": "Question 3?"}, {"role": "assistant", "content": text}]
    ids = tokenizer(tokenizer.apply_chat_template(said, tokenize=False), add_special_tokens=False, return_tensors="pt")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == int(ids["input_ids"][0, -1])  # the case that breaks
    with torch.no_grad():
        hidden = model.model(input_ids=ids["input_ids"]).last_hidden_state[0, -1]
        raw = float(model.score(hidden))
    scale = manifest["scale"]
    assert scored.score.value == pytest.approx((raw - scale["mean"]) / scale["std"], abs=1e-4)


def test_padding_and_company_change_no_score(trained):
    folder, _, _ = trained
    scorer = load_scorer(str(folder / "RM"))
    rows = [rollout(Prompt("Question 3?"), text) for text in ("a", "abcdefgh" * 4, "bb", "c")]
    together = [s.value for s in scorer.score(rows)]
    alone = [scorer.score([row])[0].value for row in rows]
    assert together == pytest.approx(alone, abs=1e-4)


def test_the_gradient_does_not_depend_on_the_micro_batches():
    scoring = load_scoring(str(tiny.folder()), 0, device="cpu", dtype="float32")
    examples, _ = make_scored_texts(judged("pairs", prompts=4), scoring.tokenizer, scoring.max_length)
    examples = [dataclasses.replace(e, weight=0.2 + 0.1 * k) for k, e in enumerate(examples)]

    def gradient(tokens):
        scoring.model.zero_grad()
        value = accumulate(scoring, examples, RewardRecipe(**SMALL | {"micro_batch_tokens": tokens}), "bradley_terry")
        return value, torch.cat([p.grad.flatten() for p in scoring.model.parameters() if p.grad is not None])

    (one, whole), (other, cut) = gradient(10_000), gradient(1)
    assert one == pytest.approx(other, rel=1e-5)
    torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-6)


def test_only_the_last_layers_are_trained(tmp_path):
    manifest, _ = train(tmp_path, judged("pairs", prompts=20), train_layers=1, epochs=1)
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "RM").state_dict()
    before = load_scoring(str(tiny.folder()), 0, device="cpu").model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert manifest["trained"] and moved and all("layers.1." in n or "norm" in n or "score" in n for n in moved)


def test_loss_of_an_example_is_weighted_by_what_was_said():
    scores = torch.tensor([1.5, 0.5])
    pair = ScoredTexts("p", ((1,), (2,)), (1, 1), (0, 1))
    assert float(loss_of(scores, pair, "bradley_terry", 0.01)) == pytest.approx(0.353262, abs=1e-6)
    rated = ScoredTexts("p", ((1,),), (1,), target=0.25)
    assert float(loss_of(scores[:1], rated, "mean_squared", 0.01)) == pytest.approx(1.25**2)


def test_figures_by_hand():
    examples = [ScoredTexts("p", ((1,), (2,)), (3, 1), (0, 1)), ScoredTexts("q", ((1,), (2,)), (2, 2), (0, 1))]
    found = measure(examples, [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])])
    assert (found.accuracy.mean, found.accuracy.n) == (0.5, 2)
    assert found.log_loss == pytest.approx((0.126928 + 1.313262) / 2, abs=1e-6)
    # confidences .8808 (right) and .7311 (wrong), each alone in its bin
    assert found.error == pytest.approx(((1 - 0.880797) + 0.731059) / 2, abs=1e-6)


# -- frozen -----------------------------------------------------------------------------------------------------------


def test_a_changed_file_is_noticed_when_loading_and_while_running(trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained[0] / "RM", folder)
    scorer = load_scorer(str(folder))
    rows = [rollout(Prompt("Question 3?"), "abc")]
    before = scorer.score(rows)[0].value
    (folder / "config.json").touch()  # looks changed, and is not
    assert scorer.score(rows)[0].value == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    look = (folder / "model.safetensors").stat()
    (folder / "model.safetensors").write_bytes(bytes(weights))
    os.utime(folder / "model.safetensors", ns=(look.st_atime_ns, look.st_mtime_ns))
    with pytest.raises(ScorerError, match=r"model\.safetensors"):
        scorer.verify()  # as a run does at its end, whatever the time of change says
    (folder / "model.safetensors").touch()
    with pytest.raises(ScorerError, match=r"frozen, but its model\.safetensors is not the file that was trained"):
        scorer.score(rows)
    with pytest.raises(ScorerError, match=r"model\.safetensors"):
        load_scorer(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ScorerError, match=r"safetensors"):
        RewardModel(folder)


def test_a_manifest_of_an_earlier_version_is_refused_with_what_to_write(tmp_path):
    (tmp_path / "reward_model.json").write_text(json.dumps({"files": {}, "normalise": True}))
    with pytest.raises(ScorerError, match=r'earlier version\. Write "normalize" for "normalise"'):
        Seal.of(tmp_path)


def test_nothing_is_overwritten_and_nothing_half_done_is_left(trained, tmp_path):
    folder, _, _ = trained
    with pytest.raises(RunError, match="never overwritten"):
        train_reward_model(folder / "p.jsonl", folder / "RM", RewardRecipe(**SMALL))
    assert (folder / "RM" / "report.svg").stat().st_size > 1000


# -- ensembles --------------------------------------------------------------------------------------------------------


def test_an_ensemble_of_models_and_its_caution(tmp_path):
    manifest, _ = train(tmp_path, judged("pairs", prompts=30), ensemble=3, ensemble_by="subsets", combine="worst")
    assert manifest["ensemble"] == ["member-0", "member-1", "member-2"]
    rows = [rollout(Prompt("Question 3?"), "aab"), rollout(Prompt("Question 3?"), "zzz")]
    worst = load_scorer(str(tmp_path / "RM")).score(rows)
    mean = load_scorer({"ensemble": str(tmp_path / "RM"), "combine": "mean"}).score(rows)
    for low, middle in zip(worst, mean, strict=True):
        members = [low.parts[f"member-{k}"] for k in range(3)]
        assert len(set(members)) == 3  # they do differ
        assert low.value == min(members) and middle.value == pytest.approx(sum(members) / 3)
        assert low.parts["disagreement"] == pytest.approx(torch.tensor(members).std(correction=0).item(), abs=1e-5)
    load_scorer(str(tmp_path / "RM")).verify()
    settings = json.loads((tmp_path / "RM" / "member-1" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]
    shutil.rmtree(tmp_path / "RM" / "member-2")
    shutil.copytree(tmp_path / "RM" / "member-0", tmp_path / "RM" / "member-2")  # a valid model, but another
    with pytest.raises(ScorerError, match=r"member-2/reward_model\.json is not the file that was trained"):
        load_scorer(str(tmp_path / "RM"))


class Fixed:
    def __init__(self, name, *scores):
        self.name, self.scores = name, scores

    def score(self, rollouts: list[Rollout]):
        return list(self.scores)


def test_how_an_ensemble_combines():
    rows = tiny.rollouts()[:2]
    a = Fixed("a", Score(value=1.0), Score(value=0.0))
    b = Fixed("b", Score(value=3.0), Score(abstained=True))
    assert Ensemble([a, b], "mean").score(rows)[0].value == 2.0
    assert Ensemble([a, b], "worst").score(rows)[0].value == 1.0
    assert Ensemble([a, b], "uncertain", 0.5).score(rows)[0].value == 2.0 - 0.5 * 1.0
    assert Ensemble([a, b]).score(rows)[1].abstained
    assert Ensemble([a, a]).members == ["a", "a#2"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"scorers": ["length"], "combine": "worst"}, "two scorers or more"),
        ({"scorers": ["length", "brevity"], "combine": "wurst"}, "Did you mean 'worst'"),
        ({"scorers": ["length", "brevity"], "combine": "worst", "weights": [1, 2]}, "no setting 'weights'"),
        ({"ensemble": "/nowhere", "combine": "worst"}, "no ensemble of reward models"),
    ],
)
def test_bad_ensembles(spec, message):
    with pytest.raises(ScorerError, match=message):
        load_scorer(spec)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_no_signal_is_said(tmp_path):
    prompts = [Prompt(f"q{i}") for i in range(5)]
    ties = [Pair(p, named(p, "a"), named(p, "b"), 0.5) for p in prompts]
    equal = [Rating(p, named(p, "a"), 3.0) for p in prompts]
    for preferences, why in ((ties, "every pair is a tie"), (equal, "all 5 judgements are the same: 3.0")):
        write_preferences(tmp_path / "p.jsonl", preferences)
        with pytest.raises(FeedbackError, match=f"holds no signal: {why}"):
            train_reward_model(tmp_path / "p.jsonl", tmp_path / "RM", RewardRecipe(**SMALL))
    assert not (tmp_path / "RM").exists()


def test_a_text_too_long_is_refused_with_its_line_or_left_out(tmp_path):
    good = judged("pairs", prompts=20)
    long = Pair(good[0].prompt, named(good[0].prompt, "a" * 300), good[0].rejected)
    with pytest.raises(FeedbackError, match=r"p\.jsonl:1: a text of \d+ tokens, and the reward model reads 256"):
        train(tmp_path, [long, *good], epochs=1, held_out=1 / 20)
    (tmp_path / "b").mkdir()
    _, lines = train(tmp_path / "b", [long, *good], epochs=1, skip_bad=True)
    assert any("1 left out: longer than 256 tokens" in line for line in lines)


def test_a_loss_that_cannot_read_the_form(tmp_path):
    with pytest.raises(RecipeError, match=r"'bradley_terry' cannot read rankings.*all_pairs, plackett_luce"):
        train(tmp_path, judged("rankings", prompts=10), loss="bradley_terry")
    with pytest.raises(RecipeError, match="Did you mean 'bradley_terry'"):
        RewardRecipe.make(loss="bradly_terry")
    with pytest.raises(RecipeError, match="epochs = 0"):
        RewardRecipe.make(epochs=0)
