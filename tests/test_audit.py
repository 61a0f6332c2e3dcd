"""The page of a loss: what is known about the four best known ones stands there with its number."""

import dataclasses
import html.parser
import json
from functools import cache
from pathlib import Path

import pytest

import lossmith.losses as L
from batches import no_trap_warnings
from lossmith.cli.audit import audit_
from lossmith.errors import ProofError
from lossmith.proofs import audit
from lossmith.report.audit import html_page, sections
from lossmith.report.audit.sentences import short
from lossmith.report.audit.table import HEADS, markdown, redo
from shell import lossmith
from test_proofs import Pairs

audited = cache(audit)  # seconds for each loss


def page(name):
    with no_trap_warnings():
        return audited(L.get_loss(name) if isinstance(name, str) else name)


def lines(name):
    """{(section, label): (number, text)}"""
    return {(s.title, line.label): (line.number, line.text) for s in sections(page(name)) for line in s.lines}


OPTIMIZES, SPREAD, LENGTH, PENALTY = (
    "What it optimizes", "Easy and hard prompts", "Length", "What the penalty pushes to"
)  # fmt: skip


def test_grpo_divides_by_a_deviation_and_by_the_length():
    found, said = page("grpo"), lines("grpo")
    assert (
        found.on_policy.residual > 0.1
        and "not the gradient of it: cosine 0.98" in said[OPTIMIZES, "on-policy, without KL"][1]
    )
    assert found.unscaled.residual < found.on_policy.residual / 2
    ratio, text = said[SPREAD, "even against hard"]
    assert float(ratio) == pytest.approx(1.472, abs=1e-3) and "counts 1.472 times an even one" in text
    assert said[SPREAD, "the same without its deviation"][0] == "1"
    assert said[LENGTH, "exponent of a token's weight"][0] == "-1" and said[LENGTH, "1 token against 8"][0] == "8"
    assert found.long.residual > 0.5
    assert said["Rewards shifted and scaled", "3·R"][1].startswith("the advantage is unchanged")
    assert found.advantages[0][1] == pytest.approx((1.5, -0.5, -0.5, -0.5), abs=1e-5)
    assert found.advantages[2][1] == (0, 0, 0, 0)
    assert all(push.cosine > 0.9 for push in found.push)


@pytest.mark.slow
def test_dr_grpo_has_neither_bias():
    found, said = page("dr_grpo"), lines("dr_grpo")
    number, text = said[OPTIMIZES, "on-policy, without KL"]
    assert number == "0" and "0.09375·∇E[r] exactly: (G−1)/G, divided by the constant 8" in text
    assert said[SPREAD, "even against hard"][0] == "1" and said[LENGTH, "1 token against 8"][0] == "1"
    assert found.notes == ("max_length = 8 was filled in",)
    assert found.noise_to_leave_one_out == pytest.approx(1) and found.noise_to_reinforce < 1


def test_rloo_is_unbiased_and_takes_its_penalty_seriously():
    said = lines("rloo")
    assert said[OPTIMIZES, "on-policy, without KL"] == ("0", "expected gradient = 1·∇E[r] exactly: unbiased")
    assert "= 1·∇(E[r] − 0.05·KL) exactly" in said[OPTIMIZES, "on-policy, with its KL"][1]
    assert said[SPREAD, "even against hard"][0] == "1"


def test_the_books_ppo_pushes_away_from_the_reference():
    found, said = page("book_ppo_clip"), lines("book_ppo_clip")
    assert "no push at all" in said[PENALTY, "sampled by the policy itself"][1]
    number, text = said[PENALTY, "sampled by the reference"]
    assert float(number) < -0.9 and text.startswith("pushes away from the reference")
    assert len(found.traps) == 2 and found.with_kl.residual > 0.1 and found.on_policy.residual < 1e-12
    assert found.noise_to_reinforce == pytest.approx(1)


@pytest.mark.slow
def test_what_biases_a_token_mean():
    said = lines("rloo_token")
    assert float(said[OPTIMIZES, "completions of 1 to 6 tokens"][0]) > 0.1
    number, text = said[OPTIMIZES, "the same, divided by a constant"]
    assert number == "0" and "exactly" in text
    assert (OPTIMIZES, "the same, divided by a constant") not in lines("grpo")


@pytest.mark.slow
def test_scores_that_the_loss_changes_are_said_to_be_changed():
    with no_trap_warnings():
        found = page(L.get_loss("dr_grpo", truncated="zero"))
    assert any("before this loss shapes" in note for note in found.notes) and found.on_policy.residual > 0.1
    assert not [f for f in found.findings if f.status == "failed"]


@pytest.mark.slow
def test_a_critic_is_shown_with_and_without_error():
    found = page("a2c")
    assert found.exact_critic.residual < 1e-12 < 0.1 < found.on_policy.residual


def test_no_check_fails_on_these():
    for name in ("grpo", "dr_grpo", "rloo", "book_ppo_clip", "a2c"):
        assert not [f for f in page(name).findings if f.status == "failed"]
        assert sections(page(name))[-1].note == "No check fails."


def test_json_round_trip():
    for name in ("grpo", "book_ppo_clip"):
        data = page(name).to_dict()
        assert json.loads(json.dumps(data, allow_nan=False)) == data
        assert data["on_policy"]["cosine"] == page(name).on_policy.cosine and data["name"] == name


class WellFormed(html.parser.HTMLParser):
    """Every element is closed, in order; nothing is loaded from anywhere."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "img", "link", "iframe") and not {"src", "href"} & {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(text):
    parser = WellFormed()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return " ".join("".join(parser.text).split())


def test_the_page_is_whole_and_says_what_the_terminal_says():
    for name in ("grpo", "book_ppo_clip"):
        text = parsed(html_page(page(name)))
        for section in sections(page(name)):
            assert section.title in text
            assert all(" ".join(line.text.split()) in text and line.number in text for line in section.lines)
        assert "min(r" in text and "http" not in html_page(page(name))


def test_names_and_traps_of_others_are_escaped():
    hostile = {"name": "<script>alert(1)</script>", "traps": ("<b>bold</b> & worse",)}
    text = html_page(dataclasses.replace(page("grpo"), **hostile))
    assert "<script" not in text and "<b>bold" not in text and "&lt;b&gt;bold&lt;/b&gt; &amp; worse" in text
    assert "alert(1)" in parsed(text)


def test_a_loss_from_outside_has_a_page():
    found = page(Pairs())
    assert found.paper is None and found.length is None and found.advantages == ()
    assert found.on_policy.cosine > 0.5 and found.difficulty and found.with_kl is None


def test_what_cannot_be_measured_is_said():
    class Wants(Pairs):
        needs = frozenset({"reward", "mood"})

    found = audit(Wants())
    assert "needs mood" in found.notes[0] and sections(found) == []
    parsed(html_page(found))


def test_a_greedy_reward_can_be_enumerated():
    class Greedy(Pairs):
        needs = frozenset({"reward", "group", "reward_greedy"})

        def __call__(self, batch):
            advantage = (batch.reward - batch.reward_greedy)[:, None] * batch.mask
            loss = -(advantage * batch.logp).sum() / max(int(batch.mask.any(1).sum()), 1)
            return L.LossOutput(loss, advantage, {"policy": loss}, {})

    if "reward_greedy" in L.Batch.__dataclass_fields__:
        assert audit(Greedy()).on_policy.residual < 1e-12


def test_numbers_do_not_lie_by_rounding():
    assert [short(x) for x in (0.99998, 1.0, 1e-15, 0.123456, float("inf"), None, -1.0)] == [
        "0.99998", "1", "0", "0.1235", "∞", "–", "-1"
    ]  # fmt: skip


def test_the_table_of_losses(monkeypatch):
    monkeypatch.setattr("lossmith.report.audit.table.audit", audited)
    with no_trap_warnings():
        text = markdown([L.get_loss("grpo")])
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows[:3]} == {len(HEADS)}
    assert rows[2][:2] == ["| grpo", "not ∇E[r]"] and rows[2][6] == "T^-1"
    assert "| k1 in the loss | nothing | 0 |" in text


def test_one_row_of_the_table_is_redone_alone(monkeypatch):
    """The page that is in the docs, of which one row is out of date and one is missing."""
    written = (Path(__file__).parent.parent / "docs" / "proofs.md").read_text(encoding="utf-8")
    grpo, dapo = (next(line for line in written.splitlines() if line.startswith(f"| {x} |")) for x in ("grpo", "dapo"))
    stale = written.replace(grpo, "| grpo | no longer true |").replace(dapo + "\n", "").replace("| sft |", "| gone |")
    measured = []

    def as_sft(loss):
        measured.append(loss.name)
        return dataclasses.replace(page("sft"), name=loss.name)

    monkeypatch.setattr("lossmith.report.audit.table.audit", as_sft)
    lines, before = redo(stale, ["grpo"]).splitlines(), written.splitlines()
    assert sorted(measured) == ["dapo", "grpo", "sft"] and len(lines) == len(before)
    assert {new.split(" | ")[0] for new, old in zip(lines, before, strict=True) if new != old} == {"| grpo", "| dapo"}
    with pytest.raises(ProofError, match="Did you mean 'grpo'"):
        redo(written, ["grop"])


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("lossmith.cli.audit.audit", audited)
    shown = lossmith("audit", "book_ppo_clip").stdout
    for piece in ("trap", "What it optimizes", "pushes away from the reference", "No check fails.", "needs logp, mask"):
        assert piece in shown
    path = tmp_path / "page.html"
    result = lossmith("audit", "grpo", "--json", "--html", path)
    assert json.loads(result.stdout) == page("grpo").to_dict()
    assert "∇(E[r] − 0.04·KL)" in parsed(path.read_text(encoding="utf-8"))


def test_the_command_says_what_is_wrong(tmp_path):
    with pytest.raises(L.LossError, match="Did you mean"):
        audit_("grop")
    (tmp_path / "no").write_text("a file")
    with pytest.raises(ProofError, match="nothing can be written"):
        audit_("reinforce", html=tmp_path / "no" / "page.html")
