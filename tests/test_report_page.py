"""The page about runs: whole, dead, of other kinds, and with texts that would like to be markup."""

import dataclasses
import html.parser
import json
import re
import shlex
import shutil
import tomllib

import pytest
import tomli_w

import lossmith as ls
import shell
import tiny
from lossmith.losses import CATALOGUE, example_loss
from lossmith.report.page.completions import pairs, shown
from lossmith.report.page.family import differences, families
from lossmith.report.page.folder import read_runs
from lossmith.report.page.formula import mathml
from lossmith.report.page.story import about_run

HOSTILE = (
    "</script><script>document.title='broken'</script><img src=http://evil.example/x onerror=alert(1)>\"'&amp;\x1b[2J"
)
SETTINGS = dict(
    device="cpu", dtype="float32", prompts=[f"{HOSTILE} Question {i}?" for i in range(13)], held_out=10, steps=3,
    prompts_per_step=3, samples_per_prompt=3, max_tokens=8, learning_rate=3e-3, quiet=True, seed=0,
    loss="grpo(beta=0.02)", name="first",
)  # fmt: skip


def low_bytes(completions, **columns):
    return [sum(c < "m" for c in text) / 10 for text in completions]


def distinct(completions, **columns):
    return [float(len(set(text))) for text in completions]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runs = str(tmp_path_factory.mktemp("runs"))
    return ls.train(model=str(tiny.folder()), scorer=low_bytes, watch=distinct, runs=runs, **SETTINGS).folder.path


@pytest.fixture(scope="module")
def preferring(tmp_path_factory):
    pairs = [{"prompt": f"Q{i}?", "chosen": "aaaa bb", "rejected": "zzz yy"} for i in range(16)]
    return ls.prefer(
        pairs, model=str(tiny.folder()), device="cpu", dtype="float32", runs=str(tmp_path_factory.mktemp("p")),
        name="dpo", quiet=True, held_out=10, preferences_per_step=3,
    ).folder.path  # fmt: skip


def copied(run, target, metrics=None, **recipe):
    """The same run under another name, with another recipe or what a stop would have left of it."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("checkpoints", "policy"))
    (target / "policy").mkdir()
    settings = tomllib.loads((target / "recipe.toml").read_text()) | recipe
    (target / "recipe.toml").write_text(tomli_w.dumps(settings))
    if metrics is not None:
        lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
        (target / "metrics.jsonl").write_text("".join(lines[:metrics]))
    return target


def dead(run, target, metrics=2):
    copied(run, target, metrics)
    for name in ("summary.json", "rollouts/held-out-after.parquet", "rollouts/step-00002.parquet"):
        (target / name).unlink()
    return target


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    VOID = ("meta", "input", "br", "img", "link", "path", "line", "use", "rect", "mspace")

    def __init__(self, file):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.said = re.sub(r"\s+", " ", "".join(self.text))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open[-4:], self.getpos())
            self.open.pop()

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open[-1:]):
            self.text.append(data)


def page(*runs, to):
    return Page(ls.write_report(runs, to / "report.html"))


def test_a_page_says_what_the_run_said_and_needs_nothing_else(run, tmp_path):
    made = page(run, to=tmp_path)
    assert made.open == [] and made.tags.count("script") == 1 and "img" not in made.tags
    outside = [a for a in made.attributes if a[1] in ("src", "srcset", "action", "poster", "data")]
    links = [a[2] for a in made.attributes if a[1] in ("href", "xlink:href")]
    assert not outside and all(link.startswith("#") for link in links)
    assert not [a for a in made.attributes if a[1].startswith("on")]
    ids = [a[2] for a in made.attributes if a[1] == "id"]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links} <= set(ids)
    summary = json.loads((run / "summary.json").read_text())
    row = summary["held_out"]["difference"]
    for text in (f"{row['mean']:+.3f}", f"n = {row['n']} prompts", "grpo(beta=0.02)"):
        assert text.replace("-", "−") in made.said
    assert made.tags.count("math") == 4 and "low_bytes" in made.said
    for title in ("Reward against √KL", "Watched score", "Sampler gap", "Most pushed", "Where the time went"):
        assert title in made.said


def test_what_a_prompt_holds_is_text_and_nothing_else(run, tmp_path):
    made = page(run, to=tmp_path)
    visible = HOSTILE.replace("\x1b", "\ufffd")
    assert visible in "".join(made.text) and "\x1b" not in made.source
    assert "<img" not in made.source and made.source.count("<script") == 1


def test_the_summary_is_that_of_the_numbers(run):
    (seen,) = read_runs([run])
    told = " ".join(about_run(seen))
    summary = json.loads((run / "summary.json").read_text())
    for part in (summary["held_out"], summary["watch"]):
        for row in (part["before"], part["after"], part["difference"]):
            assert f"{abs(row['mean']):.3f}" in told and f"{abs(row['ci95_low']):.3f}" in told
    assert "n = 10 prompts" in told and "3 done" in told


def test_a_run_that_died_is_told_as_one(run, tmp_path):
    made = page(dead(run, tmp_path / "dead"), to=tmp_path)
    assert "not finished: 2 of 3 steps are recorded" in made.said
    assert "no comparison of before and after" in made.said and "that is no verdict" in made.said
    assert "preferred to before" not in made.said
    before = [r.score.value for r in ls.read_rollouts(run / "rollouts" / "held-out-before.parquet")]
    assert f"the mean held-out score was {sum(before) / 10:.3f} (n = 10)" in made.said


def test_a_run_before_its_first_step_has_a_page(run, tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    shutil.copy(run / "recipe.toml", folder)
    made = page(folder, to=tmp_path)
    assert "0 of 3 steps are recorded" in made.said and "No step is recorded" in made.said


def test_a_run_on_preferences_has_a_page(preferring, tmp_path):
    made = page(preferring, to=tmp_path)
    assert "held-out preference accuracy" in made.said and "it learned from preferences" in made.said
    assert "Better sides" in made.said and "Watched score" not in made.said


def test_seeds_of_one_recipe_are_one_family_and_other_settings_are_not(run, tmp_path):
    second = copied(run, tmp_path / "second", seed=1, name="second")
    third = copied(run, tmp_path / "third", loss="rloo", name="third")
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    (second / "metrics.jsonl").write_text("".join(json.dumps(r | {"reward": r["reward"] + 1}) + "\n" for r in lines))
    seen = read_runs([run, second, third])
    groups = families(seen)
    assert [[r.name for r in group.runs] for group in groups] == [["first", "second"], ["third"]]
    for step, mean, low, high in groups[0].band("reward"):
        reward = lines[step - 1]["reward"]
        assert (mean, low, high) == pytest.approx((reward + 0.5, reward, reward + 1))
    assert dict(differences(seen)) == {"loss": ["grpo(beta=0.02)", "grpo(beta=0.02)", "rloo"], "seed": ["0", "1", "0"]}
    made = page(run, second, third, to=tmp_path)
    assert "3 runs of 2 recipes, 3 of them finished. They differ in loss and seed." in made.said
    assert "over 2 seeds" in made.said and made.open == []


def test_the_most_pushed_are_those_with_the_largest_sum_of_credit(run):
    (seen,) = read_runs([run])
    found = shown(seen)
    rows = ls.read_recorded(run)
    sums = {}
    for record in rows:
        for row in record.rows:
            sums[(record.step + 1, row.completion)] = sum(map(abs, row.advantage)) / row.length  # of grpo: 1/(N·T)
    first = found.pushed[0]
    step = {key: value for key, value in sums.items() if key[0] == first.step}
    assert step[(first.step, first.text)] == pytest.approx(max(step.values()))
    for number in {x.step for x in found.table}:
        assert sum(x.push for x in found.table if x.step == number) == pytest.approx(1)
    assert found.best[0].score == max(x.score for x in found.table)
    assert found.worst[0].score == min(x.score for x in found.table)
    assert found.total == len(found.table) == 27


def test_the_command_beside_a_completion_explains_that_one(run):
    (seen,) = read_runs([run])
    one = shown(seen).pushed[0]
    told = json.loads(shell.lossmith(*shlex.split(one.command)[1:], "--json").stdout)
    assert one.text in _texts(told)


def _texts(found):
    """Every text in what JSON held."""
    if isinstance(found, dict | list):
        return [x for part in (found.values() if isinstance(found, dict) else found) for x in _texts(part)]
    return [found]


def test_a_long_run_shows_whole_steps_from_its_first_to_its_last(run):
    (seen,) = read_runs([run])
    found = shown(seen, rows=20)
    assert {x.step for x in found.table} == {1, 3} and len(found.table) == 18 and found.total == 27
    assert {x.step for x in shown(seen, rows=1).table} == {1}


def test_the_pairs_are_of_one_prompt_and_the_ends_are_marked(run):
    (seen,) = read_runs([run])
    both = pairs(seen)
    assert len(both) == 10
    marked = {p.said: p.change for p in both if p.said}
    changes = [p.change for p in both]
    if max(changes) > 0:
        assert marked["the greatest rise"] == max(changes)
    if min(changes) < 0:
        assert marked["the greatest fall"] == min(changes)


def test_findings_of_the_run_and_of_the_doctor_stand_there_once(run, tmp_path):
    folder = copied(run, tmp_path / "ill")
    finding = dataclasses.asdict(ls.doctor(run).findings[0]) if ls.doctor(run).findings else {}
    said = {
        "after_step": 1, "detector": "made_up", "level": "stop", "sentence": "the <b>policy</b> fell", "value": 0.5,
        "n": 7, "of": "completions", "steps": {"first": 0, "last": 1, "count": 2}, "places": [], "cause": "a cause",
        "cure": "a cure", "source": "", "voids": False,
    }  # fmt: skip
    with (folder / "findings.jsonl").open("a") as file:
        file.write(json.dumps(said) + "\n" + json.dumps({**said, "level": "note"}) + '\n{"detector": "to')
    made = page(folder, to=tmp_path)
    assert made.said.count("the <b>policy</b> fell.") == 2  # in the summary, as the gravest, and in its place
    assert "in steps 1 to 2" in made.said and "findings.jsonl: 1 line could not be read" in made.said
    assert not finding or finding["sentence"] in made.said


def test_damaged_files_are_a_note_or_one_clear_error(run, tmp_path):
    folder = copied(run, tmp_path / "damaged")
    (folder / "summary.json").write_text('{"steps": 3, "held_out": {"before": 1}}')
    (folder / "rollouts" / "step-00001.parquet").write_bytes(b"PAR1 no")
    made = page(folder, to=tmp_path)
    assert "summary.json is not as a run writes it" in made.said and "step-00001.parquet" in made.said
    for text in ('{"step": 0}\n{"step": \n{"step": 2}\n', '{"step": "x"}\n'):
        (folder / "metrics.jsonl").write_text(text)
        with pytest.raises(ls.RunError, match=r"metrics\.jsonl"):
            page(folder, to=tmp_path)


def test_what_cannot_be_a_report_is_refused(run, tmp_path):
    for runs, output, said in (
        ([], "r.html", "give one run folder or more"),
        ([run, run], "r.html", "given twice"),
        ([tmp_path / "none"], "r.html", "no run folder"),
        ([tmp_path], "r.html", "neither recipe.toml nor metrics.jsonl"),
        ([run], "r.pdf", "a report is an .html file"),
    ):
        with pytest.raises(ls.RunError, match=said):
            ls.write_report(runs, tmp_path / output)


def test_the_command_writes_the_page(run, tmp_path):
    out = shell.lossmith("report", run, "-o", tmp_path / "out.html").stdout
    assert "about 1 run" in out and (tmp_path / "out.html").read_text().startswith("<!doctype html>")
    assert "give one run folder" in shell.lossmith("report", code=2).stderr


def test_somebody_elses_loss_is_shown_without_running_it(run, tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\ndef mine(batch): ...\n")
    made = page(copied(run, tmp_path / "own", loss=f"{tmp_path}/own.py:mine"), to=tmp_path)
    assert not ran.exists() and "L(θ) =" in made.said  # as summary.json has it


def test_every_loss_of_the_catalogue_is_mathematics_in_the_page():
    for name in CATALOGUE:
        lines = mathml(example_loss(name))
        assert lines, name
        for line in lines:
            assert line.startswith("<math") and "\\" not in line and "&amp;" not in line, (name, line)
