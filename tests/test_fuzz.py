"""Whatever stands in a file that is read: it is used, or refused by an error of ours. Damage is made from seeds."""

import functools
import hashlib
import json
import random
import shutil
import sqlite3
import struct
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tomli_w

import lossmith as ls
import tiny
from lossmith.adapters.configurations import read as read_configuration
from lossmith.errors import LossmithError
from lossmith.feedback.agreement import agreement_report
from lossmith.feedback.convert import convert
from lossmith.feedback.gather import gather
from lossmith.feedback.judgement import Judgement
from lossmith.feedback.output_set import OutputSet, named, read_sets, write_sets
from lossmith.feedback.store import Store
from lossmith.losses import parse_loss
from lossmith.project import Project
from lossmith.prompts import load_prompts
from lossmith.replay import read_recorded, replay
from lossmith.report.run.frontier import read_steps
from lossmith.scorers import check_scorer
from lossmith.training import Recipe, plan
from lossmith.training.offline.loop import PreferenceRecipe

ODD = (
    None, True, False, 0, -1, 10**30, 1e308, float("nan"), float("-inf"), "", " ", "x", "\ud800", "\x00", "\u2028",
    "~nobody/x", "1e5", [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, ["a", 1], "é" * 300, "a/b/c", "http://",
)  # fmt: skip
SPLICES = (
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\n", b"\r", b"null", b"NaN", b"1e999", b"[", b"]", b"{", b"}",
    b"\\ud800", b",,", b"true", b"-", b"9" * 5000, b"'", b"\xe2\x80\xa8", b"[" * 3000, b"=", b"#",
)  # fmt: skip


def damaged(data, rng):
    """Bytes with one to three wounds."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.choice((1, 3, 20))]
        elif kind == 2:
            data[at:at] = rng.choice(SPLICES)
        elif kind == 3:
            data[at:at] = data[max(0, at - 30) : at]
        elif kind == 4 and rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def changed(value, rng):
    """A JSON value with one of its parts replaced, removed or renamed."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return value[:at] + [changed(value[at], rng)] * rng.choice((0, 1, 1, 1, 2)) + value[at + 1 :]
    key = rng.choice(sorted(value))
    out = dict(value)
    kind = rng.randrange(6)
    if kind == 0:
        del out[key]
    elif kind == 1:
        out[rng.choice(("", "x", "prompt", "outputs", "name", "id"))] = out.pop(key)
    else:
        out[key] = changed(value[key], rng)
    return out


def wounded(rows, rng):
    """Rows as JSON lines: a row changed in its structure, or its bytes."""
    if rng.random() < 0.6:
        rows = changed(rows, rng)
        rows = rows if isinstance(rows, list) else [rows]
        return "\n".join(json.dumps(row) for row in rows).encode()
    return damaged("\n".join(json.dumps(row) for row in rows).encode(), rng)


RECIPE = {
    "steps": 3, "held_out": 0.5, "temperature": 0.9, "loss": {"name": "grpo", "beta": 0.1}, "stop": ["a"],
    "scorer": {"scorers": ["length", "helpfulness"], "weights": [1.0, 2.0]}, "pass_columns": [],
    "seed": 4, "model": str(tiny.folder()),
    "learning_rate": 1e-3, "runs": "r", "name": "n", "prompts": "p.txt", "compile": False, "kl_budget": 3.0,
    "dtype": "auto", "watch": "length", "top_k": 3, "memory_gb": 2.0,
}  # fmt: skip
PROMPTS = [{"prompt": "Why?", "a": 1}, {"prompt": [{"role": "user", "content": "How?"}], "a": [1, {"b": "c"}]}]
PAIRS = [
    {"prompt": "Why?", "chosen": "a b", "rejected": "c", "annotator": "ann", "margin": 0.5},
    {"prompt": [{"role": "user", "content": "How?"}], "chosen": [{"role": "assistant", "content": "x"}],
     "rejected": [{"role": "assistant", "content": "y"}]},
]  # fmt: skip
OTHERS = (
    [{"prompt": "Why?", "ranking": [["a"], ["b", "c"]], "annotator": "ann"}],
    [{"prompt": "Why?", "completion": "a", "rating": 3, "low": 1, "high": 5}],
    [{"prompt": "Why?", "completion": "a", "label": True}],
)


def write_toml(value, rng):
    try:
        text = tomli_w.dumps(value if isinstance(value, dict) else {"steps": value})
    except (TypeError, ValueError):  # what TOML cannot hold
        text = tomli_w.dumps(RECIPE)
    data = text.encode("utf-8", "surrogatepass")
    return damaged(data, rng) if rng.random() < 0.5 else data


def recipe(tmp_path, rng):
    (tmp_path / "r.toml").write_bytes(write_toml(changed(RECIPE, rng), rng))
    made = Recipe.make("r.toml", **Recipe.read(tmp_path / "r.toml"))
    (tmp_path / "p.txt").write_text("Why?\nHow?\nWho?\nWhere?\n")
    asked = tmp_path / "p.txt" if made.prompts == "p.txt" else made.prompts
    plan(made.model_copy(update={"prompts": asked, "prompts_per_step": 1}))


def preference_recipe(tmp_path, rng):
    fields = {"preferences": "p.jsonl", "loss": {"name": "dpo", "beta": 0.2}, "epochs": 2, "form": "auto"}
    (tmp_path / "r.toml").write_bytes(write_toml(changed(fields, rng), rng))
    PreferenceRecipe.make("r.toml", **PreferenceRecipe.read(tmp_path / "r.toml"))


def prompts(tmp_path, rng):
    suffix = rng.choice((".jsonl", ".json", ".csv", ".tsv", ".txt"))
    data = {
        ".jsonl": lambda: wounded(PROMPTS, rng),
        ".json": lambda: damaged(json.dumps(changed(PROMPTS, rng)).encode(), rng),
        ".csv": lambda: damaged(b'prompt,a\n"Why, so?",1\nHow?,2\n', rng),
        ".tsv": lambda: damaged(b"prompt\ta\nWhy?\t1\nHow?\t2\n", rng),
        ".txt": lambda: damaged(b"Why?\nHow?\n", rng),
    }[suffix]()
    (tmp_path / f"p{suffix}").write_bytes(data)
    found = load_prompts(tmp_path / f"p{suffix}", pass_columns=())
    assert all(p.messages and p.text.encode() for p in found)


def parquet(tmp_path, rng):
    file = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Why?", "How?"], "a": [b"\xff", None]}), file)
    file.write_bytes(damaged(file.read_bytes(), rng))
    load_prompts(file)


def preferences(tmp_path, rng):
    file = tmp_path / "p.jsonl"
    file.write_bytes(wounded(rng.choice([PAIRS, *OTHERS]), rng))
    gather(file, skip_bad=rng.random() < 0.3)


def made_sets():
    chosen = load_prompts(["Why?", "How?"])
    return [OutputSet(p, (named(p, "a"), named(p, "b", (1, 2)), named(p, "c"))) for p in chosen]


def sets(tmp_path, rng):
    file = tmp_path / "s.jsonl"
    file.write_bytes(wounded([s.as_row() for s in made_sets()], rng))
    for one in read_sets(file):
        json.dumps(one.as_row())


def scorer(tmp_path, rng):
    spec = rng.choice(
        (
            {"scorers": ["length", "helpfulness"], "weights": [1.0, 0.5], "standardize": True},
            {"steps": "length", "segments": "line", "gain": "difference"},
            {"scorers": ["length", "length"], "combine": "mean", "penalty": 1.0},
            ["length", {"scorers": ["length"]}],
        )
    )
    check_scorer(changed(spec, rng), columns=())


def loss(tmp_path, rng):
    parse_loss(changed({"name": "grpo", "beta": 0.1, "trust": "clip", "clip_high": 0.3}, rng))


@functools.cache
def judged_file():
    """The bytes of a judgement file, made once."""
    path = Path(tempfile.mkdtemp()) / "j.db"
    judged(path)
    return path.read_bytes()


def judged(path):
    with Store(path) as store:
        made = made_sets()
        store.add_sets(made)
        names = [tuple(o.id for o in s.outputs) for s in made]
        tiers = [[names[1][2]], [names[1][0], names[1][1]]]
        store.add(
            [
                Judgement(made[0].id, "pair", names[0][:2], "first", "ann", "pair"),
                Judgement(made[0].id, "pair", names[0][:2], "second", "bob", "pair"),
                Judgement(made[1].id, "ranking", names[1], tiers, "ann", "ranking"),
                Judgement(made[1].id, "rating", names[1][:1], 4, "bob", "rating", scale="1-5"),
            ]
        )


def judgements(tmp_path, rng):
    file = tmp_path / "j.db"
    file.write_bytes(judged_file())
    if rng.random() < 0.3:
        file.write_bytes(damaged(file.read_bytes(), rng))
    else:
        damage_row(file, rng)
    with Store(file, create=False) as store:
        found, known = store.judgements(), store.sets()
    if rng.random() < 0.2:  # it takes long
        agreement_report(found, known).render()
    for form in ("pairs", "rankings", "ratings", "labels"):
        [p.as_row() for p in convert(form, found, known).preferences]


def damage_row(file, rng):
    table = rng.choice(("sets", "judgements", "judgements"))
    db = sqlite3.connect(file)
    db.execute("DROP TRIGGER no_change")
    db.execute("PRAGMA ignore_check_constraints = ON")
    number, row = rng.choice(db.execute(f"SELECT number, row FROM {table}").fetchall())
    new = wounded([json.loads(row)], rng) if rng.random() < 0.8 else rng.choice((b"", b"null", b"3", b"\xff"))
    value = new if rng.random() < 0.2 else new.decode("utf-8", "replace")
    db.execute(f"UPDATE {table} SET row = ? WHERE number = ?", (value, number))
    db.commit()
    db.close()


STEP = {"step": 0, "reward": 0.4, "watch": 0.2, "kl_ref": 0.01, "tokens": 90, "completions": 8, "time": {"a": 1.0}}


def metrics(tmp_path, rng):
    (tmp_path / "metrics.jsonl").write_bytes(wounded([STEP, STEP | {"step": 1}, STEP | {"step": 2}], rng))
    for record in read_steps(tmp_path):
        assert all(isinstance(record.get(key, 0.0), (int, float)) for key in ("reward", "watch"))


def project(tmp_path, rng):
    folder = tmp_path / "p"
    (folder / "runs").mkdir(parents=True)
    (folder / "reward_model").mkdir()
    files = {
        "lossmith.toml": b'source = "x"\nprompts = 2\n',
        "prompts.jsonl": b'{"prompt": "Why?"}\n{"prompt": "How?"}\n',
        "reward_model/reward_model.json": b'{"trained": true, "held_out": {"accuracy": {"mean": 0.5, "n": 3}}}',
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    write_sets(folder / "outputs.jsonl", made_sets())
    (folder / "judgements.db").write_bytes(judged_file())
    victim = folder / rng.choice([*files, "outputs.jsonl", "judgements.db"])
    if rng.random() < 0.2:
        victim.unlink()
        victim.mkdir()
    else:
        victim.write_bytes(damaged(victim.read_bytes(), rng))
    found = Project.around(folder)
    if found is not None:
        assert len(found.stages()) == 5


def reward_model(tmp_path, rng):
    folder, seal = tmp_path / "rm", hashlib.sha256(b"{}").hexdigest()
    folder.mkdir()
    manifest = {"trained": True, "files": {"config.json": seal}, "scale": {"mean": 0.0, "std": 1.0}}
    manifest |= rng.choice(({}, {"ensemble": ["m0", "m1"], "combine": "mean", "penalty": 1.0}))
    (folder / "config.json").write_text("{}")
    (folder / "reward_model.json").write_bytes(wounded([manifest], rng))
    check_scorer(str(folder), columns=())


@functools.cache
def finished_run():
    """The folder of a run of two steps, without what is large, made once."""
    run = ls.train(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=[f"Question {i}?" for i in range(6)],
        held_out=2, scorer="length", steps=2, prompts_per_step=2, samples_per_prompt=2, max_tokens=5, quiet=True,
        runs=tempfile.mkdtemp(), name="n", checkpoint_minutes=0, evaluate_every=1,
    )  # fmt: skip
    shutil.rmtree(run.folder.path / "policy")
    return run.folder.path


def run_folder(tmp_path, rng):
    """A run's folder is diagnosed, replayed, explained and reported on, whatever has become of one of its files."""
    folder = tmp_path / "n"
    shutil.copytree(finished_run(), folder)
    victim = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    data = victim.read_bytes()
    if victim.suffix == ".jsonl":
        victim.write_bytes(wounded([json.loads(line) for line in data.splitlines()], rng))
    elif victim.suffix == ".json" and rng.random() < 0.6:
        victim.write_text(json.dumps(changed(json.loads(data), rng)))
    elif rng.random() < 0.1:
        victim.unlink()
    else:
        victim.write_bytes(damaged(data, rng))
    refusals = []
    for look in (
        lambda: ls.doctor(folder).as_dict(),
        lambda: [replay(record, [parse_loss("grpo@trl")]) for record in read_recorded(folder)],
        lambda: ls.explain(folder),
        lambda: ls.write_report(folder, tmp_path / "report.html"),
    ):
        try:
            look()
        except LossmithError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


RECORDED = (
    [{"input": "q", "output": t, "gts": None, "score": s, "step": 7} for t, s in (("one", 1.0), ("two", 0.0))],
    [{"content": "text", "rewards": r, "input_lengths": 4, "token_ids": [5, 6, 7, 8], "sample_loss_mask": 1.0,
      "token_loss_mask": [0, 0, 1, 1], "advantages": [0.0, 0.0, 0.7, 0.7], "generation_logprobs": [0, 0, -1.0, -2.0],
      "prev_logprobs": [0, 0, -1.1, -2.1], "idx": 0} for r in (1.0, 0.0)],
    [{"token_ids": [1, 2, 3], "loss_mask": [False, True, True], "advantages": [0.0, 0.5, 0.5],
      "inference_logprobs": [0.0, -1.0, -0.5], "trainer_logprobs": [0.0, -1.1, -0.4], "entropy": [0.0, 1.0, 1.0]}] * 2,
    [{"id": "x", "task": {}, "group": {"id": "g"}, "traces": [{
        "rewards": {"a": {"score": 1.0, "weight": 0.5}},
        "nodes": [
            {"parent": None, "message": {"role": "user", "content": "u"}, "token_ids": [1], "mask": [False]},
            {"parent": 0, "message": {"role": "assistant", "content": "a"}, "token_ids": [3, 4],
             "mask": [False, True], "logprobs": [-0.5]},
        ]}]}],
    [{"prompt_tokens": [1, 2], "response_tokens": [3, 4], "reward": r, "advantage": 0.7, "finish_reason": "length",
      "logprobs": [-1.0, -1.5], "prompt_idx": 4} for r in (1.0, 0.0)],
)  # fmt: skip


def recorded_by_others(tmp_path, rng):
    file = tmp_path / "rollouts.jsonl"
    file.write_bytes(wounded(rng.choice(RECORDED), rng))
    for record in read_recorded(file):
        replay(record, [parse_loss("grpo@trl")])
    ls.doctor(file)


CONFIGURATIONS = sorted((Path(__file__).parent / "configurations").iterdir())


def configuration(tmp_path, rng):
    source = rng.choice(CONFIGURATIONS)
    file = tmp_path / source.name
    file.write_bytes(damaged(source.read_bytes(), rng))
    read_configuration(str(file))


READERS = (
    recipe, preference_recipe, prompts, parquet, preferences, sets, scorer, loss, judgements, metrics, project,
    reward_model, run_folder, recorded_by_others, configuration,
)  # fmt: skip


def sweep(reader, tmp_path, seeds):
    outcomes = {"used": 0, "refused": 0}
    for seed in seeds:
        place = tmp_path / f"{reader.__name__}-{seed}"
        place.mkdir()
        try:
            reader(place, random.Random(struct.pack("<q", seed)))
            outcomes["used"] += 1
        except LossmithError as error:
            assert str(error).strip() and "\n\n" not in str(error), seed
            assert "Input should" not in str(error) and "Traceback" not in str(error), (seed, error)
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{reader.__name__}, seed {seed}: {type(error).__name__}: {error}") from error
    return outcomes


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__)
def test_damage_is_used_or_refused_by_an_error_of_ours(reader, tmp_path):
    outcomes = sweep(reader, tmp_path, range(6 if reader is run_folder else 30))  # it takes a second
    assert outcomes["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__)
def test_damage_ten_thousand_times(reader, tmp_path):
    sweep(reader, tmp_path, range(1000, 1060 if reader is run_folder else 1000 + 10_000 // len(READERS)))
