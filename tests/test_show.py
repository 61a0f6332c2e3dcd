"""Losses side by side and the weight's curve, against typed numbers and loss.weight; the commands that show them."""

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import lossmith.losses as L
from batches import quiet_loss
from lossmith.cli import app
from lossmith.report.loss import changes_of_preset, compare, weight_plot
from lossmith.report.loss.catalogue_page import catalogue_page
from lossmith.report.loss.comparison import _value
from lossmith.report.loss.curve import BOTTOM, HEIGHT, HIGH, LEFT, LOW, RIGHT, TOP, WIDTH, stopped_regions


def run(*words: str) -> None:
    app(list(words), result_action="return_value")


# -- compare ----------------------------------------------------------------------------------------------------------

# losses.md, section 8: [1, 0, 0, 0] and [1, 1, 1, 0]
ADVANTAGES = {
    "grpo": ((1.5, -0.5, -0.5, -0.5), (0.5, 0.5, 0.5, -1.5)),
    "grpo@trl": ((1.4997, -0.4999, -0.4999, -0.4999), None),
    "dr_grpo": ((0.75, -0.25, -0.25, -0.25), None),
    "rloo_token": ((1, -0.3333, -0.3333, -0.3333), (0.3333, 0.3333, 0.3333, -1)),
    "grpo@nemo_rl": ((1, -0.5774, -0.5774, -0.5774), (0.5774, 0.5774, 0.5774, -1)),
    "gpg": ((3, -1, -1, -1), (0.3333, 0.3333, 0.3333, -1)),
    "pass_at_k": ((2, 0, 0, 0), (0, 0, 0, 0)),
    "maxrl": ((3, -1, -1, -1), None),
}


def test_advantages_are_the_typed_ones():
    found = compare([quiet_loss(name) for name in ADVANTAGES])
    for i, typed in enumerate(ADVANTAGES.values()):
        for rewards, expected in zip(((1, 0, 0, 0), (1, 1, 1, 0)), typed, strict=True):
            if expected is not None:
                assert found.advantages[rewards][i] == pytest.approx(expected, abs=6e-5)
        assert found.advantages[1, 1, 1, 1][i] == (0, 0, 0, 0)


def test_what_has_no_advantage_says_why():
    found = compare([quiet_loss("ppo"), quiet_loss("online_dpo"), quiet_loss("remax")])
    assert found.advantages[1, 0, 0, 0] == ("needs value", "no advantage", "needs reward_greedy")
    assert found.weights["A > 0"][1] is None and found.weights["A > 0"][0][0] == pytest.approx(0.1)


def test_three_grpos_and_why_they_differ():
    found = compare([quiet_loss(f"grpo@{x}") for x in ("trl", "verl", "nemo_rl")])
    values = {d.name: d.values for d in found.differences}
    assert values["dual_clip"] == ("none", "3", "none") and values["beta"] == ("0", "0", "0.01")
    assert values["eps"][:2] == ("0.0001", "1e-06") and values["advantage"] == ("group", "group", "nemo_loo")
    assert "aggregate" not in values  # token mean in all three
    assert [row[-1] for row in found.weights["A < 0"]] == [10, 0, 10]
    words = {d.name: d.words for d in found.differences}["advantage_scale"]
    assert "standard deviation" in words[0] and "as the estimator gives it" in words[2]


def test_columns_are_headed_by_what_was_changed(tmp_path, capsys, monkeypatch):
    changes = [
        ("grpo", {}),
        ("grpo", {"beta": 0.1}),
        ("grpo", {"clip_high": 0.3, "kl_estimator": "k2"}),
        ("dpo", {"beta": 0.3}),
    ]
    losses = [quiet_loss(name, **changed) for name, changed in changes]
    names = compare(losses).names
    assert names == ("grpo", "grpo(beta=0.1)", "grpo(clip_high=0.3, kl_estimator='k2')", "dpo(beta=0.3)")
    for name, loss in zip(names, losses, strict=True):
        assert L.parse_loss(name) == loss  # one can ask for it by its heading
    assert compare([quiet_loss("grpo"), quiet_loss("grpo")]).names == ("grpo #1", "grpo #2")
    monkeypatch.setenv("COLUMNS", "100")
    run("losses", "compare", "grpo", "grpo(beta=0.1)")
    text = capsys.readouterr().out
    assert re.search(r"^ +grpo  grpo\(beta=0\.1\)", text, re.M) and text.count("grpo(beta=0.1)") >= 4
    file = tmp_path / "my.py"
    file.write_text("def mine(batch, *, beta=0.1):\n    return beta * batch.logp.sum()\n")
    run("losses", "compare", f"{file}:mine", f"{file}:mine(beta=0.3)")
    text = capsys.readouterr().out
    assert "mine(beta=0.1)" in text and "mine(beta=0.3)" in text


def test_the_same_composition_is_recognized():
    found = compare([quiet_loss("reinforce"), quiet_loss("reinforce").replace(name="again"), quiet_loss("opo")])
    assert found.same == (("reinforce", "again"),)
    with pytest.raises(L.LossError, match="at least two"):
        compare([quiet_loss("grpo")])


@pytest.mark.parametrize("name", [n for n in L.CATALOGUE if "@" in n])
def test_presets_say_what_they_change(name):
    entry = L.find_entry(name)
    changed = {d.name: d.values for d in changes_of_preset(name)}
    base, preset = L.example_loss(entry.preset_of).to_dict(), L.example_loss(name).to_dict()
    for key, (_, after) in changed.items():
        assert key not in preset or after == _value(preset[key]), key
    for axis in ("advantage", "trust", "aggregate", "mismatch"):
        assert (axis in changed) == (base.get(axis) != preset.get(axis))


def test_the_command_marks_what_differs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    run("losses", "compare", "grpo@trl", "grpo@verl", "grpo@nemo_rl")
    text = capsys.readouterr().out
    assert "1.4997" in text and "≠ 1.5" in text and "≠ 0" in text and "dual_clip" in text
    assert len(text.splitlines()) <= 60  # one screen
    run("losses", "compare", "grpo", "dr_grpo", "--json")
    assert json.loads(capsys.readouterr().out)["names"] == ["grpo", "dr_grpo"]
    with pytest.raises(L.LossError, match="at least two"):
        run("losses", "compare", "grpo")
    with pytest.raises(L.LossError, match=r"no loss 'grop'.*'grpo'"):
        run("losses", "compare", "grop", "ppo")


# -- the curve --------------------------------------------------------------------------------------------------------


def drawn(name: str) -> ET.Element:
    return ET.fromstring(weight_plot(quiet_loss(name)))


def regions(svg: ET.Element) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {"A > 0": [], "A < 0": []}
    for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
        if rect.get("class") == "stopped":
            found[rect.get("data-sign")].append((float(rect.get("data-from")), float(rect.get("data-to"))))
    return found


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("ppo", [(1.2, 10)], [(0.1, 0.8)]),
        ("ppo_dual_clip", [(1.2, 10)], [(0.1, 0.8), (3, 10)]),
        ("book_clip", [(1.2, 10)], [(1.2, 10)]),
        ("rollout_is", [(0.1, 0.8), (1.2, 10)], [(0.1, 0.8), (1.2, 10)]),
        ("cispo", [], []),
        ("reinforce", [], []),
    ],
)
def test_stopped_regions(name, good, bad):
    found = regions(drawn(name))
    for got, expected in ((found["A > 0"], good), (found["A < 0"], bad)):
        assert [x for pair in got for x in pair] == pytest.approx([x for pair in expected for x in pair], rel=1e-9)


@pytest.mark.parametrize("name", ["ppo", "cispo", "sapo", "vespo", "gppo", "dro", "dppo_tv"])
def test_the_points_are_the_weights(name):
    """Each point of each polyline, turned back into (r, w), lies on the curve of loss.weight."""
    loss, svg = quiet_loss(name), drawn(name)
    shown = [e for e in svg.iter("{http://www.w3.org/2000/svg}polyline") if e.get("class") == "weight"]
    one = next(
        float(e.get("y"))
        for e in svg.iter("{http://www.w3.org/2000/svg}text")
        if e.text == "1" and e.get("text-anchor") == "end"
    )
    unit = (HEIGHT - BOTTOM) - (one - 4)  # pixels of w = 1
    count = 0
    for line in shown:
        sign = -1.0 if line.get("stroke-dasharray") else 1.0
        for x, y in (map(float, p.split(",")) for p in line.get("points").split()):
            ratio = LOW * math.exp((x - LEFT) / (WIDTH - LEFT - RIGHT) * math.log(HIGH / LOW))
            w = (HEIGHT - BOTTOM - y) / unit
            near = [float(loss.weight(ratio * (1 + s), sign)) for s in (-2e-4, 0, 2e-4)]
            assert min(near) - 0.02 <= w <= max(near) + 0.02
            assert TOP - 1 <= y <= HEIGHT - BOTTOM + 1
            count += 1
    assert count > 300


def test_bisection_finds_the_edge():
    assert stopped_regions(lambda r: float(r > math.pi)) == [(0.1, pytest.approx(math.pi, rel=1e-12))]
    assert stopped_regions(lambda r: 0.0) == [(0.1, 10.0)]


def test_names_and_formulas_are_escaped():
    with pytest.warns(L.TrapWarning):
        loss = L.get_loss("book_clip").replace(name="<script>&")
    ET.fromstring(weight_plot(loss))


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(L.CATALOGUE))
def test_every_page_can_be_shown(name, capsys):
    run("losses", "show", name)
    assert L.find_entry(name).summary.split()[0] in capsys.readouterr().out


def test_list(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    run("losses", "list")
    text = capsys.readouterr().out
    assert "grpo" in text and "presets" in text and "grpo@trl" not in text and "(trap)" in text
    assert max(map(len, text.splitlines())) <= 100
    run("losses", "list", "--presets")
    assert "grpo@trl" in capsys.readouterr().out
    run("losses", "list", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(L.CATALOGUE) >= 120
    assert {"name", "year", "coupling", "needs", "preset_of", "aliases", "traps"} <= rows[0].keys()


def test_show_code_latex_and_json(capsys):
    run("losses", "show", "grpo(clip_high=0.31)", "--code")
    code = capsys.readouterr().out
    assert code.startswith("def grpo(") and "0.31" in code
    run("losses", "show", "gspo", "--latex")
    assert r"\pi_{\theta}" in capsys.readouterr().out
    run("losses", "show", "cispo@trl", "--json")
    assert json.loads(capsys.readouterr().out)["weights"]["A > 0"][-1] == 0.2
    run("losses", "show", "online_dpo")
    assert "no weight per token" in capsys.readouterr().out


def test_plot_writes_a_file_or_says_why_not(tmp_path, capsys):
    run("losses", "show", "ppo", "--plot", str(tmp_path / "ppo.svg"))
    ET.parse(tmp_path / "ppo.svg")
    for words, message in [
        (["ppo", "--plot", str(tmp_path / "ppo.png")], r"ends in \.svg"),
        (["ppo", "--plot", str(tmp_path / "ppo.svg" / "ppo.svg")], "nothing can be written"),
        (["online_dpo", "--plot", str(tmp_path / "dpo.svg")], "nothing to plot"),
    ]:
        with pytest.raises(L.LossError, match=message):
            run("losses", "show", *words)
    assert [p.name for p in Path(tmp_path).iterdir()] == ["ppo.svg"]


# -- the pages --------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_of_the_catalogue_is_current():
    """Make it anew with: python -m lossmith.report.loss.catalogue_page > docs/catalogue.md"""
    assert (DOCS / "catalogue.md").read_text(encoding="utf-8") == catalogue_page()


def test_the_table_of_proofs_has_every_loss_and_no_failure():
    """Make it anew with: python -m lossmith.report.audit.table > docs/proofs.md (minutes)."""
    lines = (DOCS / "proofs.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    losses = [row for row in rows if row[0] in L.CATALOGUE]
    assert [row[0] for row in losses] == list(L.CATALOGUE)
    assert {row[-1] for row in losses} == {"pass"}


def test_every_link_of_the_documentation_leads_somewhere():
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)
