"""A vLLM server as the sampler: what it is asked, what is believed of it, and every way in which it fails."""

import dataclasses
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch

import lossmith as ls
import tiny
from lossmith.errors import RecipeError, RunError
from lossmith.losses import parse_loss
from lossmith.policy import SamplingSettings, token_outputs
from lossmith.policy.distribution import log_softmax_under
from lossmith.ranks import Ranks
from lossmith.samplers import VllmSampler, open_vllm, server
from lossmith.samplers.push import Checksums, digests, write_weights
from lossmith.samplers.routes import Routes
from lossmith.training import Recipe
from lossmith.training.recipe import corrected
from lossmith.training.sharing import check_ranks
from test_training import even_bytes, metrics, settings
from vllm_server import FakeVllm

SAMPLING = SamplingSettings(temperature=0.8, max_tokens=8)


def opened(server, tmp_path, policy=None, sampling=SAMPLING, timeout=20.0) -> VllmSampler:
    policy = policy or tiny.loaded()
    return open_vllm(
        policy, sampling, url=server.url, timeout=timeout, folder=tmp_path / "s", probe=tiny.prompts()[0], context=64
    )


def moved(policy):
    """Another policy, as an update would leave it."""
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(policy.version)))
    policy.version += 1


def train(server, tmp_path, **changes):
    base = dict(sampler="vllm", sampler_url=server.url, sampler_timeout=20.0, loss="grpo", checkpoint_every=1)
    return ls.train(**settings(tmp_path, **base | changes))


# -- what comes back --------------------------------------------------------------------------------------------------


def test_a_rollout_is_what_the_server_wrote_under_the_distribution_of_the_learner(tmp_path):
    with FakeVllm() as server:
        sampler = opened(server, tmp_path)
        first = sampler.sample(tiny.prompts(), 3, seed=1, step=2)
        again = sampler.sample(tiny.prompts()[::-1], 3, seed=1, step=2)
        other = sampler.sample(tiny.prompts(), 3, seed=1, step=3)
    assert [(r.prompt.id, r.sample) for r in first] == [(p.id, k) for p in tiny.prompts() for k in range(3)]
    texts = {(r.prompt.id, r.sample): r.completion_ids for r in first}
    assert texts == {(r.prompt.id, r.sample): r.completion_ids for r in again}
    assert texts != {(r.prompt.id, r.sample): r.completion_ids for r in other}
    ours = token_outputs(sampler.policy, first, SAMPLING)
    for row, rollout in zip(ours.logp, first, strict=True):
        assert torch.allclose(row[: len(rollout.completion_ids)], rollout.behavior_logp.values, atol=1e-5)
        assert rollout.behavior_logp.distribution == ours.distribution


def test_a_group_is_handed_on_as_soon_as_it_is_written(tmp_path):
    groups, told = [], []
    with FakeVllm() as server:
        opened(server, tmp_path).sample(
            tiny.prompts(), 2, seed=0, step=0, on_group=groups.append, on_progress=lambda d, n: told.append((d, n))
        )
    assert sorted(len(g) for g in groups) == [2, 2, 2] and all([r.sample for r in g] == [0, 1] for g in groups)
    assert told == [(k, 6) for k in range(1, 7)]


def test_every_push_renews_the_salt_of_the_prefix_cache_and_the_version(tmp_path):
    with FakeVllm() as server:
        sampler = opened(server, tmp_path)
        versions = set()
        for _ in range(3):
            assert sampler.push()["push_gap"] < 1e-5
            versions |= {
                r.behavior_logp.distribution.policy_version for r in sampler.sample(tiny.prompts(), 1, seed=0, step=0)
            }
            moved(sampler.policy)
        assert versions == {0, 1, 2} and len(server.salts) == 3 and server.pushes == 3


def test_nothing_of_a_push_is_left_in_the_folder(tmp_path):
    with FakeVllm() as server:
        sampler = opened(server, tmp_path)
        sampler.push()
    assert list((tmp_path / "s").iterdir()) == []


# -- weights that did not arrive --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drops", "partial"])
@pytest.mark.parametrize("checker", [True, False], ids=["checksums", "log-probabilities alone"])
def test_a_push_that_did_not_arrive_whole_is_caught(tmp_path, fault, checker):
    with FakeVllm(checker=checker) as server:
        sampler = opened(server, tmp_path)
        sampler.push()
        moved(sampler.policy)
        server.fault = fault
        with pytest.raises(RunError, match=r"did not arrive.*Restart the server.*resume"):
            sampler.sample(tiny.prompts(), 1, seed=0, step=0)
        server.fault = ""
        assert sampler.push()["push_gap"] < 1e-5


def test_a_tensor_that_the_server_keeps_packed_must_change_with_the_model():
    known, packed = {"a": "1", "b": "2"}, {"tp0:a": "1", "tp0:b": "x"}
    sums = Checksums()
    assert sums.check(packed, known) == 1
    assert sums.check({"tp0:a": "3", "tp0:b": "x"}, {"a": "3", "b": "2"}) == 1
    with pytest.raises(RunError, match=r"1 of the server's 2 tensors"):
        sums.check({"tp0:a": "3", "tp0:b": "x"}, {"a": "3", "b": "9"})


def test_of_a_tensor_that_is_packed_away_the_checksum_says_nothing():
    gone = hashlib.sha256(b"").hexdigest()
    sums = Checksums()
    assert sums.check({"a": "1", "b": gone}, {"a": "1", "b": "2"}) == 1
    assert sums.check({"a": "3", "b": gone}, {"a": "3", "b": "4"}) == 1


def test_no_tensor_of_the_first_push_may_be_all_that_arrived():
    with pytest.raises(RunError, match="none"):
        Checksums().check({"a": "1"}, {"a": "2"})


def test_weights_of_fused_projections_are_compared_too():
    policy = tiny.loaded()
    layer = policy.model.model.layers[0].self_attn
    fused = torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]).detach()
    expected = hashlib.sha256(fused.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
    assert digests(policy)["model.layers.0.self_attn.qkv_proj.weight"] == expected


def test_the_handed_over_folder_is_the_model(tmp_path):
    policy = tiny.loaded()
    moved(policy)
    write_weights(policy, tmp_path / "w")
    again = ls.load_policy(tmp_path / "w", dtype="float32", device="cpu")
    assert again.checksum() == policy.checksum() and [p.name for p in tmp_path.iterdir()] == ["w"]
    assert again.model.lm_head.weight is not again.model.get_input_embeddings().weight  # a tied head would go stale


def test_log_probabilities_of_something_else_are_caught(tmp_path):
    said = r"0\.5 nats from the learner's.*at most 0\.0001"
    with FakeVllm(fault="noise") as server, pytest.raises(RunError, match=said):
        opened(server, tmp_path).push()


# -- servers that are wrong, dead, slow or mad ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("tokenizer", "another tokenizer"),
        ("bfloat16", "--dtype float32"),
        ("raw", "--logprobs-mode"),
        ("chunks", "--no-enable-chunked-prefill"),
    ],
)
def test_a_server_of_another_kind_is_refused_before_the_first_step(tmp_path, fault, said):
    with FakeVllm(fault=fault) as server, pytest.raises(RunError, match=said):
        opened(server, tmp_path)


def test_a_server_of_another_model_refuses_the_weights_and_the_run_says_so(tmp_path):
    other = tiny.policy(tiny.llama(hidden_size=16))
    with FakeVllm(policy=other) as server, pytest.raises(RunError, match=r"(?s)not taken.*500.*this very model"):
        opened(server, tmp_path).push()


def test_a_server_that_is_gone_when_weights_are_sent_is_said_to_be_gone(tmp_path):
    with FakeVllm() as server:
        sampler = opened(server, tmp_path)
    with pytest.raises(RunError, match=r"^http://\S+ cannot be reached \(.*refused\)\. The run is saved[^.]*\.$"):
        sampler.push()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("garbage", "is not JSON"),
        ("vocabulary", "token ids that are not all below 264"),
        ("logprobs", "log-probabilities that are not one number"),
        ("stale", r"sampled from the weights \['old'\]"),
        ("dies", "cannot be reached"),
        ("hangs", "no answer within 1 s"),
        ("drips", "no answer within 1 s"),
    ],
)
def test_an_answer_that_is_none_stops_the_run_in_one_sentence(tmp_path, fault, said):
    with FakeVllm() as server:
        sampler = opened(server, tmp_path, timeout=20.0)
        sampler.push()
        server.fault, sampler.routes.timeout = fault, 1.0 if "no answer" in said else 20.0
        with pytest.raises(RunError, match=f"{said}.*") as caught:
            sampler.sample(tiny.prompts(), 1, seed=0, step=0)
        assert "resume" in str(caught.value)


def test_a_slow_server_is_waited_for_and_writes_the_same(tmp_path):
    with FakeVllm() as server:
        sampler = opened(server, tmp_path)
        fast = sampler.sample(tiny.prompts(), 2, seed=0, step=0)
        server.fault = "slow"
        slow = sampler.sample(tiny.prompts(), 2, seed=0, step=0)
    assert [r.completion_ids for r in slow] == [r.completion_ids for r in fast]


def test_a_port_that_another_program_has(tmp_path):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{other.server_address[1]}"
        with pytest.raises(RunError, match=r"does not say what it runs.*VLLM_SERVER_DEV_MODE=1"):
            opened(SimpleNamespace(url=url), tmp_path)
        other.shutdown()


def test_no_server_at_all(tmp_path, monkeypatch):
    monkeypatch.delenv("LOSSMITH_VLLM", raising=False)
    with pytest.raises(RunError, match=r"give sampler_url.*LOSSMITH_VLLM"):
        open_vllm(tiny.loaded(), SAMPLING, url=None, timeout=5, folder=tmp_path, probe=tiny.prompts()[0], context=64)
    with socket.socket() as taken:  # somebody is there, and it is no such server
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RunError, match="cannot be reached"):
            open_vllm(
                tiny.loaded(), SAMPLING, url=address, timeout=5, folder=tmp_path, probe=tiny.prompts()[0], context=64
            )


def test_a_server_that_ends_while_it_starts_shows_its_last_words(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'no such option: --port'\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("LOSSMITH_VLLM", str(program))
    with pytest.raises(RunError, match=r"(?s)status 3.*server\.log.*no such option: --port"):
        open_vllm(
            tiny.loaded(), SAMPLING, url=None, timeout=20, folder=tmp_path / "s", probe=tiny.prompts()[0], context=64
        )


@pytest.mark.parametrize(
    "trap", [pytest.param("", marks=pytest.mark.slow, id="willing"), pytest.param("trap '' TERM", id="deaf")]
)
def test_the_server_ends_with_its_owner_however_that_ends(tmp_path, trap):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{trap}\necho $$\nexec sleep 60\n")
    program.chmod(0o755)
    code = (
        "import pathlib, time; from lossmith.samplers import server; here = pathlib.Path.cwd(); server.END_WITHIN = 1;"
        "kept = server.VllmServer(str(here / 'python'), here / 'own', 'float32', 8, here / 'log', []);"
        "print('up', flush=True); time.sleep(60)"
    )
    (tmp_path / "own" / server.START).mkdir(parents=True)
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    with owner:
        assert owner.stdout.readline() == b"up\n"
        within(20, lambda: (tmp_path / "log").read_text().strip())
        there = int((tmp_path / "log").read_text())
        group = os.getpgid(there)
        time.sleep(0.3)
        assert alive(there) and (tmp_path / "own").exists()
        owner.kill()
    within(20, lambda: not (alive(there) or alive(-group) or (tmp_path / "own").exists()))


ENGINE = """
import os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/health":
            time.sleep(600)  # for an engine that is dead
        if os.path.exists("cut off"):
            self.close_connection = True
        else:
            self.send_response(503 if os.path.exists("unwell") else 200)
            self.end_headers()
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Server).serve_forever()
"""


@pytest.mark.parametrize("how", ["unwell", "cut off"])
def test_whoever_waits_for_a_server_whose_engine_has_died_is_told_at_once(tmp_path, monkeypatch, how):
    """vLLM itself waits until they have gone, and they would until their time is up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "LOOK", 0.1)
    (tmp_path / "engine.py").write_text(ENGINE)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} engine.py "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "own").mkdir()
    made = server.VllmServer(str(tmp_path / "python"), tmp_path / "own", "float32", 8, tmp_path / "log", [])
    try:
        made.wait(20)
        time.sleep(0.3)
        assert not made.gone()
        threading.Timer(0.3, (tmp_path / how).touch).start()
        with pytest.raises(RunError, match=r"cannot be reached .*look there"):
            Routes(made.url, 60.0, "look there").ask("/collective_rpc")
        assert made.gone()
    finally:
        made.close()
    assert not (tmp_path / "own").exists()


def within(seconds, true):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(process):
    """A process, or, below 0, any of a group."""
    try:
        os.kill(process, 0) if process > 0 else os.killpg(-process, 0)
    except ProcessLookupError:
        return False
    return True


# -- kept-token sets --------------------------------------------------------------------------------------------------


def test_with_the_servers_kept_sets_the_learner_takes_the_same_support():
    logits = torch.tensor([[2.0, 1.999, 0.0, -1.0]])
    near = SamplingSettings(top_k=1)
    given = log_softmax_under(logits, near, torch.tensor([1]), [(1,)])
    assert given[0, 1] == 0 and given[0, 0] == -math.inf  # its own top-1 is token 0, by rounding
    policy, sampling = tiny.loaded(), SamplingSettings(top_k=3, max_tokens=6)
    rollouts = ls.policy.sample(policy, tiny.prompts(), 2, sampling, seed=0)
    wider = [dataclasses.replace(r, kept=tuple(tuple(range(264)) for _ in r.completion_ids)) for r in rollouts]
    plain = token_outputs(policy, rollouts, SamplingSettings(max_tokens=6)).logp
    assert torch.allclose(token_outputs(policy, wider, sampling, chunk=4).logp, plain, atol=1e-5)


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_with_a_server_learns_and_records_the_proof_of_each_push(tmp_path):
    with FakeVllm() as server:
        run = train(server, tmp_path)
    assert server.pushes == 4  # before the first step, and after each
    for record in metrics(run):
        assert record["push_gap"] < 1e-4 and record["push_tokens"] > 0 and record["push_tensors"] == 20
        assert record["sampler_gap"] < 1e-4 and record["ess"] > 0.99 and record["seconds_push"] >= 0
    assert run.learner.loss.mismatch.option == "tis"
    assert run.policy.version == 3


@pytest.mark.slow
def test_a_run_that_its_server_failed_is_resumed_with_the_same_result(tmp_path):
    with FakeVllm() as server:
        whole = train(server, tmp_path, name="whole")
    with FakeVllm(fault="drops later") as server, pytest.raises(RunError, match="did not arrive"):
        train(server, tmp_path, name="broken")
    path = tmp_path / "runs" / "broken"
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 2
    recipe = path / "recipe.toml"
    with FakeVllm() as server:
        text = recipe.read_text().splitlines()
        recipe.write_text("\n".join(f'sampler_url = "{server.url}"' if "sampler_url" in x else x for x in text))
        resumed = ls.resume(path, scorer=even_bytes, prompts=settings(tmp_path)["prompts"])
    assert resumed.summary["policy_checksum"] == whole.summary["policy_checksum"]
    assert json.loads((path / "summary.json").read_text())["steps"] == 3


def test_a_correction_is_on_unless_the_loss_has_one_or_is_told_otherwise():
    def of(spec):
        return corrected(parse_loss(spec), spec)

    assert of("grpo").mismatch.option == "tis"
    assert of("grpo(mismatch='none')").mismatch.option == "none"
    assert of("grpo(mismatch='icepop')").mismatch.option == "icepop"
    assert of("m2po").mismatch.option == "none"  # holds its ratio to the sampler itself
    assert Recipe.make(loss="grpo").policy_loss().mismatch.option == "none"


def test_several_ranks_are_refused_before_the_model_is_loaded(tmp_path):
    recipe = Recipe.make(sampler="vllm", model=str(tmp_path / "none"))
    check_ranks(recipe, Ranks(), False)
    with pytest.raises(RecipeError, match=r"2 ranks: train with one, or with sampler = 'torch'"):
        check_ranks(recipe, Ranks(rank=0, size=2), False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler_url": "http://127.0.0.1:1"}, "sampler = 'vllm' too"),
        ({"sampler": "vllm", "sampler_url": "127.0.0.1:1"}, "must begin with http"),
        ({"sampler": "vllm", "engine": "trl"}, "use_vllm"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.make(**changes)
