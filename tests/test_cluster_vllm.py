"""A cluster's sampler whose completions a vLLM server writes: what it does when that server fails it.

Here the actor stands in this process and the server is the one of `vllm_server.py`; on Ray, with vLLM itself:
tests/live/test_vllm_cluster.py.
"""

import types

import pytest
import torch

import lossmith as ls
import tiny
from lossmith.cluster import workers
from lossmith.cluster.remote import RemoteSampler
from lossmith.cluster.workers import SamplerProcess, Weights
from lossmith.errors import RunError
from lossmith.policy import SamplingSettings, token_outputs
from lossmith.samplers import vllm_sampler
from lossmith.training.shards import named_weights
from vllm_server import DEAD, FakeVllm


class Servers(list):
    """Every server that was started, the last one the one that runs. fault: that of those to come."""

    fault = ""

    def start(self, python, folder, dtype, context, log, options):
        server = FakeVllm(policy=ls.load_policy(folder / "start", dtype=dtype, device="cpu"), fault=self.fault)
        server.log, server.ended, server.folder = log, False, folder
        server.wait, server.tail = lambda timeout: server.__enter__(), lambda: ""
        server.gone, server.close = lambda: server._closed or server.fault == DEAD, lambda: end(server)
        self.append(server)
        return server


def end(server):
    if not server.ended:
        server.ended = True
        server.__exit__()


@pytest.fixture
def servers(monkeypatch):
    made = Servers()
    monkeypatch.setattr(vllm_sampler, "VllmServer", made.start)
    monkeypatch.setattr(vllm_sampler, "check_vllm", lambda: "python")
    monkeypatch.setattr(workers, "import_ray", lambda: types.SimpleNamespace(get=lambda held: held))
    yield made
    for server in made:
        end(server)


@pytest.fixture
def actor(servers, tmp_path, monkeypatch):
    model = str(tiny.folder())  # which all tests of this process share
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers.tempfile, "tempdir", str(tmp_path))
    recipe = ls.Recipe.make(
        model=model, sampler="vllm", max_tokens=8, temperature=0.8, dtype="float32", device="cpu",
        sampler_timeout=20.0,
    )  # fmt: skip
    return SamplerProcess(recipe.written(), str(tmp_path))


def weights(version, moved=0.0):
    policy = tiny.loaded()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(moved * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    named = dict(named_weights(policy))
    return Weights(version, (named,), len(named), policy.checksum())


def ask(actor, sent, step=0):
    rollouts, checksum, measured = actor.sample(sent, tiny.prompts(), 2, step, tiny.prompts()[0], 64)
    assert checksum == sent.checksum
    return rollouts, measured


def texts(rollouts):
    return [(r.prompt.id, r.sample, r.completion_ids) for r in rollouts]


def test_every_push_is_proven_on_the_samplers_own_server(actor, servers):
    for version in range(3):
        rollouts, measured = ask(actor, weights(version, 0.02 * version))
        assert measured["push_gap"] < 1e-4 and "push_restarts" not in measured
        assert measured["push_tensors"] == 21  # the head, which is tied to the embeddings, is sent as one of its own
        assert {r.behavior_logp.distribution.policy_version for r in rollouts} == {version}
    assert len(servers) == 1 and servers[0].pushes == 3


def test_a_server_that_has_died_is_started_again_and_writes_the_same(actor, servers):
    sent = weights(3, 0.02)
    first, _ = ask(actor, sent)
    servers[0].__exit__()
    again, measured = ask(actor, sent)
    assert texts(again) == texts(first) and measured["push_restarts"] == 1
    assert len(servers) == 2 and servers[0].ended and not servers[1].ended
    assert servers[0].folder != servers[1].folder
    after, measured = ask(actor, weights(4, 0.03))
    assert "push_restarts" not in measured and len(servers) == 2 and texts(after) != texts(first)


def test_a_server_that_dies_in_the_middle_of_a_round_is_started_again(actor, servers):
    sent = weights(3, 0.02)
    first, _ = ask(actor, sent)
    servers[0].fault = DEAD
    again, measured = ask(actor, sent)
    assert texts(again) == texts(first) and measured["push_restarts"] == 1 and len(servers) == 2


@pytest.mark.slow
def test_servers_that_die_one_after_another_end_the_run_in_words(actor, servers):
    servers.fault = DEAD
    with pytest.raises(RunError, match=r"died 3 times over the same work\. Out of memory\?.*fewer samplers.*resume it"):
        ask(actor, weights(0))
    assert len(servers) == 3 and all(server.ended for server in servers)


@pytest.mark.parametrize(("fault", "said"), [("drops", "did not arrive"), ("garbage", "is not JSON")])
def test_a_server_that_lives_and_is_wrong_is_not_started_again(actor, servers, fault, said):
    """A push that was dropped stops the run: a fresh server would hide what went wrong."""
    ask(actor, weights(0))
    servers[0].fault = fault
    with pytest.raises(RunError, match=rf"^a sampler on \S+: .*{said}.*server\.log"):
        ask(actor, weights(1, 0.02))
    assert len(servers) == 1


def test_a_version_that_was_made_again_is_sent_again(actor, servers):
    """A learner that went back to its checkpoint makes it anew, and some hardware makes another."""
    ask(actor, weights(1, 0.01))
    rollouts, measured = ask(actor, weights(1, 0.02))
    assert servers[0].pushes == 2 and measured["push_gap"] < 1e-4
    ours = token_outputs(actor.policy, rollouts, SamplingSettings(temperature=0.8, max_tokens=8))
    for row, rollout in zip(ours.logp, rollouts, strict=True):
        assert torch.allclose(row[: len(rollout.completion_ids)], rollout.behavior_logp.values, atol=1e-5)


def test_weights_are_read_once_for_what_is_put_and_its_checksum(monkeypatch):
    policy, put = tiny.loaded(), []
    monkeypatch.setattr(
        "lossmith.cluster.remote.import_ray", lambda: types.SimpleNamespace(put=lambda x: put.append(x) or len(put))
    )
    gathers = []
    shards = types.SimpleNamespace(weights=lambda: gathers.append(0) or dict(named_weights(policy)))
    policy.gather = lambda: pytest.fail("gathered a second time")
    sampler = RemoteSampler([], types.SimpleNamespace(policy=policy, shards=shards), tiny.prompts()[0], 64)
    sampler.push()
    assert sampler.push() == {"push_samplers": 0.0} and gathers == [0] and len(put) == 1
    assert sampler.weights.checksum == tiny.loaded().checksum()
    with torch.no_grad():
        next(iter(policy.parameters())).view(-1)[0] += 1
    policy.version += 1
    sampler.push()
    assert sampler.weights.checksum not in (None, tiny.loaded().checksum()) and len(put) == 2


def test_an_adapters_checksum_is_that_of_the_whole_policy():
    policy = ls.load_policy(tiny.folder(), dtype="float32", device="cpu", lora=ls.Recipe.make(lora_rank=2).lora)
    named = {name.removeprefix("policy."): x for name, x in named_weights(policy)}
    assert len(named) < len(policy.model.state_dict()) and policy.checksum(named) == policy.checksum()
    other = {name: x + 1 for name, x in named.items()}
    assert policy.checksum(other) != policy.checksum()  # it is made of what was handed over
