"""A loss from outside the package: the page that shows how is run, and what it makes is a loss like any other."""

import dataclasses
import json
import re
import types
from pathlib import Path

import pytest
import torch

import lossmith.losses as L
import tiny
from batches import double, evaluate, no_trap_warnings, random_fields
from lossmith.cli import app
from lossmith.errors import RecipeError, quiet_traps
from lossmith.losses.axes.trust import TRUST
from lossmith.losses.catalogue import user
from lossmith.losses.composition.flat import AXES
from lossmith.losses.composition.legality import KINDS
from lossmith.proofs import check_loss, prove
from lossmith.proofs.auditing import audit
from lossmith.rollouts import Distribution, Score
from lossmith.training import Learner, Recipe

PAGE = Path(__file__).parent.parent / "docs" / "your-own-loss.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """my_losses.py as the page has it: (its folder, its names)."""
    folder = tmp_path_factory.mktemp("own")
    source = "\n".join(BLOCKS[:3])
    (folder / "my_losses.py").write_text(source, encoding="utf-8")
    module = types.ModuleType("my_losses")
    exec(compile(source, str(folder / "my_losses.py"), "exec"), vars(module))
    yield folder, module
    TRUST.pop("power", None)
    for name in ("lipo", "careful_grpo"):
        user._REGISTERED.pop(name, None)


def test_the_page_runs_to_its_end(page):
    exec("\n".join([BLOCKS[3]]), dict(vars(page[1])))


def test_the_example_is_not_in_the_catalogue_and_is_fifteen_lines():
    assert "lipo" not in L.CATALOGUE
    lines = [x for x in BLOCKS[0].split("def lipo")[1].splitlines() if x.strip() and '"""' not in x]
    assert len(lines) <= 15


def test_a_function_of_the_batch(page):
    loss = L.get_loss("lipo", beta=0.5)
    assert loss.needs == {"ref_logp", "reward", "group"} and loss.to_dict()["beta"] == 0.5
    assert "softmax" in str(loss) and "beta=0.5" in str(loss)
    fields = random_fields(0)
    lam = ((fields["logp"] - fields["ref_logp"]) * fields["mask"]).sum(1)
    total, groups = 0.0, [5, 2, 9, 7]
    for g in groups:
        rows = (fields["group"] == g) & fields["mask"].any(1)
        wanted = fields["reward"][rows].softmax(0)
        total -= float((wanted * (0.5 * lam[rows]).log_softmax(0)).sum())
    out, grads = evaluate(loss, fields)
    assert float(out.loss.detach()) == pytest.approx(total / 4, rel=1e-12)
    assert grads["logp"].abs().sum() > 0
    with pytest.raises(L.LossError, match=r"lipo needs Batch\.ref_logp, which is missing; it comes from"):
        evaluate(loss, {k: v for k, v in fields.items() if k != "ref_logp"})
    with pytest.raises(L.LossError, match=r"lipo has no parameter 'bta'.*'beta'"):
        L.get_loss("lipo", bta=1)
    flat = json.loads(json.dumps(loss.to_dict() | {"function": f"{page[0]}/my_losses.py:lipo"}))
    assert L.loss_from_dict(flat).to_dict() == loss.to_dict() | {"function": f"{page[0]}/my_losses.py:lipo"}


def test_its_weight_curve_is_measured(page):
    """REINFORCE written as a function has weight 1, importance sampling weight r; scaled to 1 at r = 1."""

    def pg(batch):
        return -(batch.logp * batch.advantage[:, None] * batch.mask).sum()

    def importance(batch):
        return -7 * ((batch.logp - batch.old_logp).exp() * batch.advantage[:, None] * batch.mask).sum()

    for function, expected in ((pg, [1, 1, 1]), (importance, [0.5, 1, 2.5])):
        L.register_loss()(function)
        try:
            loss = L.get_loss(function.__name__)
            for sign in (1.0, -1.0):
                torch.testing.assert_close(loss.weight(double([0.5, 1, 2.5]), sign), double(expected))
        finally:
            user._REGISTERED.pop(function.__name__)


def test_the_conformance_suite_sees_what_is_wrong_with_a_function():
    def junk(batch):
        """Multiplies by the mask where it should select, and forgets the sign."""
        return (batch.logp * batch.reward[:, None] * batch.mask).mean()

    L.register_loss()(junk)
    try:
        failed = {f.check for f in prove(L.get_loss("junk"), (0,)) if f.status == "failed"}
        assert {"raises_reward", "padding"} <= failed
    finally:
        user._REGISTERED.pop("junk")


def test_a_composition_has_its_parts(page):
    loss = L.get_loss("careful_grpo", cap=3.0, beta=0.05)
    assert isinstance(loss, L.PolicyLoss) and loss.name == "careful_grpo"
    assert float(loss.weight(10.0, 1.0)) == 3.0 and "0.05" in str(loss) and "torch" in L.get_loss("careful_grpo").code()
    with no_trap_warnings():
        assert L.parse_loss(loss.to_dict()) == loss  # a complete table is read as it stands


def test_a_piece_of_ones_own(page):
    loss = L.get_loss("grpo", trust="power", power=0.3)
    torch.testing.assert_close(loss.weight(2.0, -1.0), double(2.0) ** 0.3)
    check_loss(loss, seeds=(0,))
    with pytest.raises(L.LossError, match="power"):
        L.get_loss("grpo", trust="power", power=0)


def twin(piece, base):
    """A class of a user's that says what this piece says: on the same axis, and no kin of the built-in class."""
    kin = piece.__mro__[: piece.__mro__.index(base)]
    said = {key: value for cls in reversed(kin) for key, value in vars(cls).items()}
    return type(
        "Mine", (base,), {k: v for k, v in said.items() if k not in ("__dict__", "__weakref__", "__post_init__")}
    )


def with_option(axis, option):
    """A composition in which this option is legal."""
    for name, changes in (("ppo", {}), ("grpo", {}), ("reinforce", {"beta": 0.1})):
        try:
            with quiet_traps():
                return L.get_loss(name, **{axis: option, **changes})
        except L.LossError:
            continue
    raise AssertionError(f"{axis}={option!r} is legal nowhere")


@pytest.mark.parametrize("axis, option", [(axis, option) for axis, known in AXES.items() for option in known])
def test_a_piece_of_a_user_can_say_all_that_a_built_in_one_can(axis, option):
    field, known = axis, AXES[axis]
    loss = with_option(axis, option)
    mine = twin(known[option], KINDS[field])(**dataclasses.asdict(getattr(loss, field)))
    with quiet_traps():
        own = loss.replace(**{field: mine})
    assert not isinstance(mine, known[option])
    for asked in ("needs", "uses_old", "coupling", "compares", "separable", "stops_gradient", "traps"):
        assert getattr(own, asked) == getattr(loss, asked), asked
    assert own.formula() == loss.formula() and own.formula("latex") == loss.formula("latex")
    assert own.code() == loss.code()


@pytest.mark.parametrize(
    "name, field",
    [
        ("m2po", "trust"),
        ("ppo", "advantage"),
        ("vapo", "advantage"),
        ("decoupled_ppo", "mismatch"),
        ("opd", "advantage"),
    ],
)
def test_and_is_evaluated_alike(name, field):
    loss = L.example_loss(name)
    built_in = getattr(loss, field)
    own = loss.replace(**{field: twin(type(built_in), KINDS[field])(**dataclasses.asdict(built_in))})
    (out, gradient), (expected, known) = (evaluate(x, random_fields(0)) for x in (own, loss))
    assert out.loss == expected.loss and all(torch.equal(gradient[key], known[key]) for key in known)


def test_audit_of_a_function(page):
    found = audit(L.get_loss("lipo")).to_dict()
    text = json.dumps(found, ensure_ascii=False)
    assert "lipo" in text and "softmax" in text


def test_the_commands_of_the_page(page, monkeypatch, capsys):
    monkeypatch.chdir(page[0])
    app(["losses", "show", "my_losses.py:lipo"], result_action="return_value")
    assert "softmax" in capsys.readouterr().out
    app(["audit", "my_losses.py:lipo(beta=0.5)"], result_action="return_value")
    assert "beta=0.5" in capsys.readouterr().out
    monkeypatch.syspath_prepend(str(page[0]))
    assert L.get_loss("my_losses:lipo", beta=0.2).to_dict()["beta"] == 0.2


@pytest.mark.parametrize("name", ["lipo", "careful_grpo"])
def test_training_with_it_moves_the_policy(page, name, monkeypatch):
    monkeypatch.chdir(page[0])
    recipe = Recipe.make(loss=f"my_losses.py:{name}", temperature=0.8, max_tokens=9, learning_rate=1e-3)
    made = Learner(tiny.policy(tiny.llama(), torch.float64), recipe.policy_loss(), recipe)
    measure = Distribution(0, temperature=0.8, dtype="float64")
    rollouts = [
        tiny_rollout.__class__(**{**vars(tiny_rollout), "score": Score(value=float(i % 3))})
        for i, tiny_rollout in enumerate(tiny.rollouts(measure=measure))
    ]
    before = [p.clone() for p in made.policy.parameters()]
    update, _ = tiny.update(made, rollouts)
    assert update.skipped == 0 and any(
        not torch.equal(a, b) for a, b in zip(before, made.policy.parameters(), strict=True)
    )


def test_what_cannot_be_loaded_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import nothing_like_it\n")
    (tmp_path / "empty.py").write_text("number = 3\ndef odd(x): return x\ndef other(): return 3\n")
    for path, message in [
        ("gone.py:mine", "there is no file 'gone.py'"),
        ("broken.py:mine", "ModuleNotFoundError"),
        ("empty.py:mine", "has no 'mine'"),
        ("empty.py:number", "is int, not a loss or a function"),
        ("empty.py:other", "returned int, not a loss"),
        ("nowhere.at.all:mine", "there is no module 'nowhere'"),
    ]:
        with pytest.raises(L.LossError, match=message):
            L.get_loss(path)
    (tmp_path / "shapes.py").write_text("def rows(batch): return batch.logp.sum(1)\ndef free(batch, *, a): return 0\n")
    with pytest.raises(L.LossError, match=r"rows must return one number .* not \[9\]"):
        L.get_loss("shapes.py:rows")(L.Batch(**random_fields(0)))
    with pytest.raises(L.LossError, match="parameter 'a' needs a name and a default"):
        L.get_loss("shapes.py:free")


def test_entry_points_are_found(monkeypatch, page):
    class Point:
        name, value = "from_a_package", "my_losses:lipo"

        @staticmethod
        def load():
            return page[1].lipo

    monkeypatch.setattr(user.importlib.metadata, "entry_points", lambda group: [Point] if group == user.GROUP else [])
    user._installed.cache_clear()
    try:
        assert L.get_loss("from_a_package").needs == {"ref_logp", "reward", "group"}
        assert "from_a_package" in [entry.name for entry in L.list_losses()]
    finally:
        user._installed.cache_clear()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("remax", r"needs Batch\.reward_greedy, which training does not provide"),
        ("m2po", r"needs the parameter m2_threshold: write m2po\(m2_threshold=\.\.\.\)"),
        ("bnpo", "known trap.*local normalizer"),
    ],
)
def test_training_refuses_what_it_cannot_provide_before_anything_loads(loss, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.make(loss=loss).policy_loss()


def test_a_function_equals_the_composition_of_the_same_parts():
    """A batch mean beside KL by k2: it passes every check, too."""

    @L.register_loss("mine")
    def mine(batch, *, beta=0.1):
        n = batch.mask.any(1).sum().clamp(min=1)
        centered = batch.reward - batch.reward.sum() / n
        gap = batch.logp - batch.ref_logp
        return (-centered[:, None] * batch.logp + beta * gap**2 / 2).sum() / n

    try:
        check_loss(L.get_loss("mine"), seeds=(0,))
        fields = random_fields(0)
        same = L.get_loss("reinforce", aggregate="seq_mean_token_sum", beta=0.3, kl_estimator="k2")
        ours, theirs = evaluate(L.get_loss("mine", beta=0.3), fields), evaluate(same, fields)
        torch.testing.assert_close(ours[0].loss, theirs[0].loss)
        torch.testing.assert_close(ours[1]["logp"], theirs[1]["logp"])
    finally:
        user._REGISTERED.pop("mine")


def test_a_losss_neighbors_import_and_a_process_that_it_starts_finds_it(tmp_path):
    """As a scorer's do: the same loader."""
    (tmp_path / "beside_my_loss.py").write_text("SCALE = 2.0\n")
    (tmp_path / "my_spawning_loss.py").write_text(
        "import multiprocessing, beside_my_loss\n"
        "def half(x): return x / beside_my_loss.SCALE\n"
        "def mine(batch):\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        return batch.logp.sum() * pool.apply(half, (1.0,))\n"
    )
    (tmp_path / "random.py").write_text("def mine(batch): return batch.logp.sum()\n")  # hides no library
    batch = L.Batch(**random_fields(0))
    whole = L.get_loss(f"{tmp_path}/random.py:mine")(batch).loss
    assert L.get_loss(f"{tmp_path}/my_spawning_loss.py:mine")(batch).loss == whole / 2
