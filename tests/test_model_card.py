"""The model card of a run's policy, and what a run says at its end of where to take it."""

import json
import re
import tomllib

import pytest
import yaml

import lossmith as ls
import tiny
from lossmith.training.card import CARD, _base_model, _named
from shell import lossmith

PAIRS = [
    {"prompt": f"Prompt {i}?", "chosen": f"good answer {i}", "rejected": f"bad answer {i}"} for i in range(12)
]  # fmt: skip


def parts(card):
    """(what a hub reads, {title: text}) of a card."""
    _, front, body = card.split("---\n", 2)
    found = re.split(r"^## (.*)$", body, flags=re.MULTILINE)
    return yaml.safe_load(front), {"": found[0]} | dict(zip(found[1::2], found[2::2], strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `lossmith train` said, and the run's folder."""
    folder = tmp_path_factory.mktemp("card")
    (folder / "secret").mkdir()
    prompts = folder / "secret" / "questions.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Prompt {i}?"}) + "\n" for i in range(14)))
    said = lossmith(
        "train", "--model", tiny.folder(), "--dtype", "float32", "--prompts", prompts, "--held-out", 5, "--steps", 2,
        "--prompts-per-step", 2, "--samples-per-prompt", 3, "--max-tokens", 8, "--runs", folder / "runs",
        "--name", "mine", "--loss", "rloo(beta=0.3)", "--scorer", "length",
    ).stdout  # fmt: skip
    return said, folder / "runs" / "mine"


def test_the_card_has_the_figures_of_the_summary_and_the_loss_that_was_in_force(trained):
    _, run = trained
    front, card = parts((run / "policy" / CARD).read_text(encoding="utf-8"))
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lossmith", "rlhf", "rloo"],
    }  # fmt: skip
    held_out = json.loads((run / "summary.json").read_text())["held_out"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card["Held-out figures"].splitlines()]
    rows = {row[0]: row[1:] for row in rows if len(row) == 4}
    for name, sign in (("before", ""), ("after", ""), ("difference", "+")):
        figure = held_out[name]
        low, high = (format(figure[end], f"{sign}.3f") for end in ("ci95_low", "ci95_high"))
        assert rows[name] == [format(figure["mean"], f"{sign}.3f"), f"{low} to {high}", str(figure["n"])]
    assert str(ls.get_loss("rloo", beta=0.3)) in card["Loss"]
    assert "`questions.jsonl`" in card["Data"] and "9 prompts without answers" in card["Data"]
    assert "5 held-out prompts" in card["Held-out figures"] and "`length`" in card["Limits"]


def test_no_path_of_the_machine_stands_in_the_card(trained):
    _, run = trained
    card = (run / "policy" / CARD).read_text(encoding="utf-8")
    recipe = tomllib.loads((run / "recipe.toml").read_text())
    assert "secret" in recipe["prompts"] and "secret" not in card and str(run.parent) not in card


def test_the_end_of_a_run_names_chat_sample_and_other_places(trained):
    said, run = trained
    last = dict(re.split(r"  +", line, maxsplit=1) for line in said.strip().splitlines()[-6:])
    assert last["the policy"] == f"{run}/policy" and last["all figures"] == str(run)
    assert last["talk to it"].startswith(f"lossmith chat {run} ")
    assert last["one prompt"] == f'lossmith sample --prompt "..." --model {run}/policy'
    assert f"vllm serve {run}/policy" in last["elsewhere"] and "hf upload YOU/mine" in last["to a hub"]
    out = lossmith("sample", "--prompt", "Hello?", "--model", run / "policy", "--max-tokens", 4).stdout
    assert json.loads(out)["prompt"] == "Hello?"


def test_the_snippet_of_the_card_runs_in_the_policys_folder(trained, monkeypatch, capsys):
    _, run = trained
    snippet = re.search(r"```python\n(.*?)```", (run / "policy" / CARD).read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.chdir(run / "policy")
    exec(snippet.replace("max_new_tokens=200", "max_new_tokens=3"), {})
    assert capsys.readouterr().out


def test_a_policy_from_preferences_has_a_card_too(tmp_path):
    run = ls.prefer(
        PAIRS,
        model=str(tiny.folder()),
        dtype="float32",
        runs=str(tmp_path),
        loss="dpo",
        held_out=4,
        epochs=1,
        quiet=True,
    )
    _, card = parts((run.folder.path / "policy" / CARD).read_text(encoding="utf-8"))
    accuracy = run.summary["held_out"]["after"]["accuracy"]
    assert f"| after | {accuracy['mean']:.3f} |" in card["Held-out figures"]
    assert str(run.learner.loss) in card["Loss"] and "held out" in card["Data"]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("/home/me/scorer.py:score", "scorer.py:score"),
        ("https://me:pass@judge.example/v1?key=abc", "judge.example/v1"),
        ("helpfulness", "helpfulness"),
        ({"scorers": ["/a/b.py:f", "length"], "weights": [1, 2]}, "b.py:f and length"),
    ],
)
def test_what_a_card_names_holds_neither_folders_nor_keys(value, name):
    assert _named(value) == name


def test_the_default_model_has_its_name_on_the_hub_and_its_license(tmp_path):
    assert _base_model("default") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert _base_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert _base_model(str(tmp_path)) == tmp_path.name
