"""Losses over a teacher's distribution: their values and gradients, the sampled form, training with a teacher."""

import dataclasses
import json

import pytest
import torch

import lossmith as ls
import lossmith.losses as L
import tiny
from batches import quiet_loss
from lossmith.policy import Teacher, token_outputs
from lossmith.policy.teacher import told
from lossmith.prompts import Prompt
from lossmith.proofs.enumeration import default_world, group_gradients
from lossmith.proofs.random_batches import random_fields
from lossmith.rollouts import Distribution, LogProbs
from lossmith.training.learner import Learner
from lossmith.training.recipe import Recipe

WHOLE = ("reverse_kl", "forward_kl", "gkd", "skew_kl", "skew_reverse_kl")
TOP = (
    "sdpo(distil_top_k=3)",
    "sdpo(distil_top_k=3, distil_tail=False)",
    "gkd(distil_top_k=3, distil_support='teacher')",
)


def by_torch(name, policy, teacher):
    """The divergence of logits [..., V] as torch's own functions have it."""
    kl = torch.distributions.kl_divergence
    q, p = (torch.distributions.Categorical(logits=x) for x in (policy, teacher))

    def mix(a, b, share):
        return torch.distributions.Categorical(probs=share * a.probs + (1 - share) * b.probs)

    return {
        "reverse_kl": lambda: kl(q, p),
        "forward_kl": lambda: kl(p, q),
        "gkd": lambda: 0.5 * kl(p, mix(p, q, 0.5)) + 0.5 * kl(q, mix(p, q, 0.5)),
        "skew_kl": lambda: kl(p, mix(p, q, 0.1)),
        "skew_reverse_kl": lambda: kl(q, mix(q, p, 0.1)),
    }[name]()


def logits(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", WHOLE)
def test_over_a_vocabulary_value_and_gradient_in_the_logits_are_those_of_torch(name):
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    z, teacher = logits(0, 2, 5, 50), logits(1, 2, 5, 50)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    batch = L.Batch(mask=mask, vocab_logp=ours.log_softmax(-1), teacher_vocab_logp=teacher.log_softmax(-1))
    loss = quiet_loss(name)(batch).loss
    wanted = by_torch(name, theirs, teacher)[mask].sum() / mask.sum()
    loss.backward()
    wanted.backward()
    assert abs(float((loss - wanted).detach())) < 1e-12
    assert float((ours.grad - theirs.grad).abs().max()) < 1e-12


def test_the_generalized_divergence_lies_between_the_two_kls():
    q, p = logits(2, 7, 20).log_softmax(-1), logits(3, 7, 20).log_softmax(-1)
    for beta, name in ((1e-4, "forward_kl"), (1 - 1e-4, "reverse_kl")):
        share = min(beta, 1 - beta)
        near = quiet_loss("gkd", jsd_beta=beta).divergence(q, p) / share
        assert torch.allclose(near, quiet_loss(name).divergence(q, p), rtol=1e-3)
    swapped = quiet_loss("gkd", jsd_beta=0.3).divergence(q, p)
    assert torch.allclose(swapped, quiet_loss("gkd", jsd_beta=0.7).divergence(p, q))


def test_the_likeliest_tokens_and_the_rest_are_a_distribution_of_one_token_more():
    q, p = logits(4, 6, 9).log_softmax(-1), logits(5, 6, 9).log_softmax(-1)
    kept = q.topk(3, -1).indices
    chosen = [x.exp().gather(-1, kept) for x in (q, p)]
    few = [torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in chosen]
    coarse = (few[0] * (few[0].log() - few[1].log())).sum(-1)
    loss = quiet_loss("reverse_kl", distil_top_k=3)
    assert torch.allclose(loss.divergence(q, p), coarse)
    assert bool((coarse <= quiet_loss("reverse_kl").divergence(q, p)).all())  # what is put together cannot tell more
    left = [x.gather(-1, kept).log_softmax(-1) for x in (q, p)]
    alone = quiet_loss("reverse_kl", distil_top_k=3, distil_tail=False)
    assert torch.allclose(alone.divergence(q, p), (left[0].exp() * (left[0] - left[1])).sum(-1))
    of_teacher = quiet_loss("forward_kl", distil_top_k=9, distil_support="teacher", distil_tail=False)
    assert torch.allclose(of_teacher.divergence(q, p), quiet_loss("forward_kl").divergence(q, p))


@pytest.mark.parametrize("spec", (*WHOLE, *TOP))
def test_it_is_zero_and_has_no_slope_where_both_agree(spec):
    p = logits(6, 4, 9).log_softmax(-1)
    leaf = p.clone().requires_grad_()
    found = ls.get_loss(spec).divergence(leaf.log_softmax(-1), p)
    assert float(found.detach().abs().max()) < 1e-12
    assert float(torch.autograd.grad(found.sum(), leaf)[0].abs().max()) < 1e-12


@pytest.mark.parametrize("sampled", ["opd", "opd(trust='logp')"])
def test_the_sampled_form_follows_the_exact_kl_in_expectation(sampled):
    world = default_world()
    exact = world.gradient(lambda t: world.tree.state_kl(world.theta, t, world.teacher))
    for spec in (sampled, "reverse_kl"):
        loss = ls.get_loss(spec).replace(aggregate="seq_mean_token_sum")
        gradients = group_gradients(loss, world, 2)
        assert gradients.exact and torch.allclose(gradients.mean(), exact, atol=1e-12), spec


def test_a_mixture_is_the_share_of_each():
    fields = random_fields(quiet_loss("sdpo_grpo"), 0)
    batch = L.Batch(**fields)
    both = quiet_loss("sdpo_grpo", reward_share=0.3).credit(batch).advantage
    alone = [quiet_loss(name).credit(batch).advantage for name in ("grpo", "opd")]
    assert torch.allclose(both, 0.3 * alone[0] + 0.7 * alone[1])


def test_a_teacher_moves_credit_between_tokens_and_never_turns_its_sign():
    batch = L.Batch(**random_fields(quiet_loss("rlsd"), 0, drift=3.0))
    plain = quiet_loss("grpo").credit(batch).advantage
    moved = quiet_loss("rlsd", teacher_share=1.0).credit(batch).advantage
    assert torch.equal(plain.sign(), moved.sign())
    share = (moved / plain)[plain != 0]
    assert 0.8 - 1e-9 <= float(share.min()) < 1 < float(share.max()) <= 1.2 + 1e-9
    assert torch.allclose(quiet_loss("rlsd", teacher_share=0.0).credit(batch).advantage, plain)


def test_early_tokens_count_more_the_further_the_policy_has_left_the_teacher():
    mask = torch.ones(1, 3, dtype=torch.bool)
    batch = L.Batch(torch.zeros(1, 3).double(), mask, teacher_logp=[[-1.0, -2.0, -1.0]])
    advantage = quiet_loss("iw_opd").credit(batch).advantage
    weights = torch.tensor([1 + 0.5, 1 + 0.5 * 0.75, 1 + 0.5 * 0.25], dtype=torch.float64)
    assert torch.allclose(advantage[0], weights * torch.tensor([-1.0, -2.0, -1.0], dtype=torch.float64))


def test_rows_of_other_vocabularies_are_refused():
    mask = torch.ones(1, 2, dtype=torch.bool)
    batch = L.Batch(mask=mask, vocab_logp=logits(0, 1, 2, 5), teacher_vocab_logp=logits(0, 1, 2, 6))
    with pytest.raises(ls.LossError, match="5 tokens and teacher_vocab_logp 6"):
        quiet_loss("reverse_kl")(batch).loss.backward()
    with pytest.raises(ls.LossError, match=r"\[1, 2, V\]"):
        L.Batch(mask=mask, vocab_logp=logits(0, 1, 2))
    sick = logits(0, 1, 2, 5)
    sick[0, 1, 3] = -torch.inf
    with pytest.raises(ls.LossError, match="row 0, token 1, number 3 of its vocabulary"):
        L.Batch(mask=mask, vocab_logp=sick)
    with pytest.raises(ls.LossError, match="extra='reverse_kl'"):
        ls.get_loss("gkd", jsd_beta=1.0)


# -- in chunks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", (*WHOLE, "sdpo(distil_top_k=5)"))
def test_in_chunks_it_is_the_divergence_of_whole_logits(spec):
    """Value, and the gradient in every parameter, against logits [M, V] of a plain forward pass in float64."""
    policy = tiny.policy(tiny.llama(), torch.float64)
    teacher = Teacher(tiny.policy(tiny.llama(seed=5), torch.float64))
    rollouts = tiny.rollouts()
    seen = teacher.sees(rollouts)
    loss, settings = ls.get_loss(spec), ls.SamplingSettings(temperature=0.8)
    out = token_outputs(
        policy, rollouts, settings, want=frozenset({"divergence"}), teacher=teacher, divergence=loss.divergence, chunk=7
    )
    rows = []
    for r, s in zip(rollouts, seen, strict=True):
        n = len(r.completion_ids)
        mine, theirs = (
            p.model(torch.tensor([x.prompt_ids + x.completion_ids])).logits[0, -n - 1 : -1] / 0.8
            for p, x in ((policy, r), (teacher.policy, s))
        )
        rows.append(loss.divergence(mine.log_softmax(-1), theirs.detach().log_softmax(-1)))
    plain = torch.cat(rows)
    assert float((out.divergence[out.mask] - plain).detach().abs().max()) < 1e-12
    weight = logits(7, len(plain))
    found = torch.autograd.grad((weight * out.divergence[out.mask]).sum(), policy.parameters())
    wanted = torch.autograd.grad((weight * plain).sum(), policy.parameters())
    assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) < 1e-12
    assert all(p.grad is None for p in teacher.policy.model.parameters())


@pytest.mark.parametrize("spec", ["gkd", "opd", "sdar", "sdpo_grpo(reward_share=0.5)"])
def test_a_learner_lowers_the_distance_to_its_teacher(spec):
    policy, wiser = tiny.policy(tiny.llama(), torch.float64), tiny.policy(tiny.llama(seed=5), torch.float64)
    recipe = Recipe.make(learning_rate=3e-3, temperature=1.0, micro_batch_tokens=40, teacher="somewhere", loss=spec)
    learner = Learner(policy, recipe.policy_loss(), recipe, teacher=Teacher(wiser))
    measure = quiet_loss("gkd").divergence
    rollouts = [scored(r) for r in tiny.rollouts()]

    def distance():
        want = frozenset({"divergence"})
        with torch.no_grad():
            out = token_outputs(
                policy, rollouts, recipe.sampling, want=want, teacher=Teacher(wiser), divergence=measure
            )
        return float(out.divergence.sum())

    before = distance()
    for step in range(3):
        update, _ = tiny.update(learner, rollouts, step)
    names = {"gkd": "divergence", "opd": "kl_teacher"}
    assert names.get(spec, "kl_teacher") in update.metrics
    assert spec == "opd" or distance() < before  # the sampled form follows the sampled tokens, which are made up here


def scored(rollout):
    measured = LogProbs(rollout.behavior_logp.values, Distribution(0, dtype="float64"))
    return dataclasses.replace(rollout, behavior_logp=measured, score=ls.Score(float(len(rollout.completion_ids))))


def test_micro_batches_of_a_divergence_add_up_to_the_whole():
    gradients = []
    for tokens in (20, 4000):
        policy, wiser = tiny.policy(tiny.llama(), torch.float64), tiny.policy(tiny.llama(seed=5), torch.float64)
        recipe = Recipe.make(temperature=1.0, micro_batch_tokens=tokens, teacher="somewhere", loss="gkd")
        learner = Learner(policy, recipe.policy_loss(), recipe, teacher=Teacher(wiser))
        rollouts = [scored(r) for r in tiny.rollouts()]
        batch = learner.make_batch(rollouts)
        learner.accumulate(rollouts, batch, learner.credit(batch))
        gradients.append([p.grad.clone() for p in policy.parameters()])
    assert max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)) < 1e-12


# -- what the teacher is told -----------------------------------------------------------------------------------------


def test_what_the_teacher_is_told_stands_after_the_users_last_words():
    assert told(Prompt("Why?"), "Think.").content == "Why?\n\nThink."
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "tool", "content": "t"}]
    assert [m["content"] for m in told(Prompt(tuple(chat)), "b").content] == ["s", "a\n\nb", "t"]
    assert told(Prompt(({"role": "system", "content": "s"},)), "b").content[-1] == {"role": "user", "content": "b"}


def test_the_teacher_reads_the_same_completions_after_another_prompt():
    policy = tiny.policy()
    rollouts = [scored(r) for r in tiny.rollouts()]
    prompts = {r.prompt.id: Prompt(r.prompt.content, {"hint": f"hint {i}"}) for i, r in enumerate(rollouts)}
    rollouts = [dataclasses.replace(r, prompt=prompts[r.prompt.id]) for r in rollouts]
    seen = Teacher(policy, "hint").sees(rollouts)
    assert [s.completion_ids for s in seen] == [r.completion_ids for r in rollouts]
    assert all("hint" in policy.decode(s.prompt_ids, special_tokens="all") for s in seen)


# -- a run ------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"Say {i}.", "hint": f"{i} is a number."} for i in range(8)]


def settings(tmp_path, **changes):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in changes.pop("rows", ROWS)))
    return {
        "model": str(tiny.folder()), "prompts": str(file), "scorer": "length", "steps": 2, "prompts_per_step": 2,
        "samples_per_prompt": 2, "max_tokens": 6, "held_out": 2, "runs": str(tmp_path / "runs"), "loss": "reverse_kl",
        "temperature": 1.0, "dtype": "float32", "device": "cpu", "learning_rate": 1e-3,
    } | changes  # fmt: skip


@pytest.mark.parametrize("spec", ["sdpo", "sdft", "opd", "rlsd", "sdpo_grpo"])
def test_a_policy_learns_from_itself_when_it_is_told_more(tmp_path, spec):
    run = ls.train(**settings(tmp_path, loss=spec, teacher="self", teacher_column="hint", name="one"))
    lines = [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    key = "divergence" if spec in ("sdpo", "sdft") else "kl_teacher"
    assert len(lines) == 2 and all(abs(line[key]) > 0 for line in lines)
    assert ls.Recipe.make(**ls.Recipe.read(run.folder.path / "recipe.toml")).teacher == "self"


def test_a_folder_teaches_and_is_no_input_that_may_change(tmp_path):
    teacher = tmp_path / "teacher"
    tiny.llama(seed=5).save_pretrained(teacher)
    tiny.tokenizer().save_pretrained(teacher)
    run = ls.train(**settings(tmp_path, teacher=str(teacher), name="one", checkpoint_every=1))
    assert run.learner.teacher.policy is not run.policy
    assert not any(p.requires_grad for p in run.learner.teacher.policy.model.parameters())
    inputs = json.loads((run.folder.path / "inputs.json").read_text())
    assert any(key.startswith("the teacher's model") for key in inputs["decisive"])


def others(tmp_path, name, **changes):
    folder = tmp_path / name
    tiny.llama(**changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_what_cannot_teach_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("lossmith.training.prepare.load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    other = others(tmp_path, "other")
    tokens = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokens["added_tokens"][0]["content"] = "<|stop|>"
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokens))
    fewer = others(tmp_path, "fewer", vocab=260)
    half = [*ROWS[:5], {"prompt": "Say 5.", "hint": " "}, *ROWS[6:]]
    cases = [
        ({}, "there is none: give teacher"),
        ({"loss": "grpo", "teacher": "self", "teacher_column": "hint"}, "teaches nothing"),
        ({"teacher": "self"}, "name a column"),
        ({"teacher_column": "hint"}, "there is none: give teacher"),
        ({"teacher": "self", "teacher_column": "hnt"}, "no such column. Did you mean 'hint'"),
        ({"teacher": "self", "teacher_column": "hint", "rows": half}, r"prompts.jsonl:6: the column 'hint'"),
        ({"teacher": other}, "another tokenizer than the policy"),
        ({"teacher": fewer}, "knows 260 tokens and the policy 264"),
        ({"teacher": str(tmp_path / "nowhere")}, "no model folder"),
        ({"teacher": "self", "teacher_column": "hint", "top_p": 0.9}, "top_p or top_k"),
        ({"teacher": "self", "teacher_column": "hint", "engine": "trl"}, "TRL"),
    ]
    for changes, message in cases:
        with pytest.raises(ls.LossmithError, match=message):
            ls.train(**settings(tmp_path, **changes))


def test_a_teacher_with_fewer_numbers_may_say_what_it_thinks_of_sampled_tokens(tmp_path):
    ls.train(**settings(tmp_path, teacher=others(tmp_path, "fewer", vocab=260), loss="opd", steps=1))


def test_a_told_prompt_that_is_too_long_is_found_before_the_first_step(tmp_path):
    rows = [*ROWS, {"prompt": "Say 7.", "hint": "long " * 60}]
    with pytest.raises(ls.RecipeError, match="what the teacher is given has"):
        ls.train(**settings(tmp_path, teacher="self", teacher_column="hint", rows=rows))


def test_answers_may_be_shown_to_the_teacher_by_name(tmp_path):
    rows = [{"prompt": row["prompt"], "answer": row["hint"]} for row in ROWS]
    with pytest.raises(ls.PromptError, match="answer"):
        ls.train(**settings(tmp_path, teacher=str(tiny.folder()), rows=rows))
    ls.train(**settings(tmp_path, teacher="self", teacher_column="answer", rows=rows, steps=1))
