"""What ranks hold in parts: written by each, read by any number and by torch's own reader; a policy, file by file."""

import contextlib
import json
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torchs
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

import tiny
from lossmith.durable import parts
from lossmith.durable.checkpoint import newest, save
from lossmith.durable.parts import SavedTensors, write_parts
from lossmith.errors import RunError
from lossmith.policy import saving
from lossmith.policy.saving import save_in_files
from lossmith.ranks import Ranks
from lossmith.training.shards import Shards


@contextlib.contextmanager
def as_rank(rank, size):
    """This process as one of several that need not be there: nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        dist.destroy_process_group()


def whole():
    """Of many rows, of fewer rows than ranks, of one row, of every type that a state has; counts of steps."""
    random = torch.Generator().manual_seed(0)
    return {
        "policy.wide": torch.randn(7, 3, generator=random),
        "policy.short": torch.randn(2, 5, generator=random).bfloat16(),
        "policy.one": torch.randn(1, generator=random),
        "0.exp_avg": torch.randn(7, 3, generator=random, dtype=torch.float64),
        "0.step": torch.tensor(3.0),
        "1.step": torch.tensor(4, dtype=torch.int32),
    }


def dealt(tensors, mesh):
    return {k: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) if x.ndim else x for k, x in tensors.items()}


def written_by(size, folder):
    folder.mkdir()
    listed = {}
    for rank in range(size):
        if size == 1:
            listed |= write_parts(folder, whole(), 0)
            continue
        with as_rank(rank, size) as mesh:
            listed |= write_parts(folder, dealt(whole(), mesh), rank)
    return listed


def empty():
    return {name: torch.full_like(x, -9) for name, x in whole().items()}


def same(ours, theirs):
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("writers", [1, 2, 3])
def test_what_any_number_of_ranks_wrote_any_number_reads(tmp_path, monkeypatch, writers, readers):
    monkeypatch.setattr(parts, "_FILE_BYTES", 60)  # several files a rank
    written_by(writers, tmp_path / "c")
    saved = SavedTensors(tmp_path / "c")
    assert saved.kinds == {name: (x.shape, x.dtype) for name, x in whole().items()}
    if readers == 1:
        found = empty()
        saved.read_into(found)
        assert all(same(found[name], x) for name, x in whole().items())
        return
    for rank in range(readers):
        with as_rank(rank, readers) as mesh:
            found, expected = dealt(empty(), mesh), dealt(whole(), mesh)
            saved.read_into(found)
            for name, x in expected.items():
                assert same(found[name].to_local() if x.ndim else found[name], x.to_local() if x.ndim else x)


def test_a_rank_writes_its_own_rows_and_no_more(tmp_path):
    listed = written_by(3, tmp_path / "c")
    assert sorted(listed) == [f"rank-{rank:05d}-00000.safetensors" for rank in range(3)]
    rows = {}
    for name in listed:
        with safe_open(tmp_path / "c" / name, "pt") as file:
            rows[name] = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert [found.get("policy.wide") for found in rows.values()] == [[3, 3], [3, 3], [1, 3]]
    assert [found.get("policy.short") for found in rows.values()] == [[1, 5], [1, 5], None]
    assert [found.get("0.step") for found in rows.values()] == [[], None, None]
    for name, entry in listed.items():
        assert entry["bytes"] == (tmp_path / "c" / name).stat().st_size


@pytest.mark.skipif(not hasattr(torchs, "HuggingFaceStorageReader"), reason="this torch has none")
def test_torch_reads_what_is_written_here(tmp_path):
    written_by(3, tmp_path / "c")
    found = {name: x for name, x in empty().items() if x.ndim}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it reads in one process
        torchs.load(found, storage_reader=torchs.HuggingFaceStorageReader(str(tmp_path / "c")), no_dist=True)
    assert all(same(x, whole()[name]) for name, x in found.items())


def test_rows_that_no_file_holds_are_missed(tmp_path):
    written_by(3, tmp_path / "c")
    (tmp_path / "c" / "rank-00001-00000.safetensors").unlink()
    with pytest.raises(RunError, match=r"does not hold all of policy\.wide"):
        SavedTensors(tmp_path / "c").read_into(empty())


def checkpoint(folder, step):
    def of_ranks(place):
        place.rmdir()
        return written_by(2, place)

    return save(folder, step, {}, {"state.json": "{}"}, of_ranks)


WRONG = {
    "rank-00001-00000.safetensors is missing": lambda file: file.unlink(),
    "rank-00001-00000.safetensors is damaged": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_without_every_ranks_file_as_it_was_is_not_used(tmp_path, wrong):
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert newest(tmp_path) == (second, [])
    WRONG[wrong](second.path / "rank-00001-00000.safetensors")
    assert newest(tmp_path) == (first, [(second, wrong)])


def test_a_checkpoint_that_a_rank_could_not_write_is_not_there(tmp_path):
    def full(place):
        written_by(1, place / "half")
        raise RunError("the disk is full")

    first = checkpoint(tmp_path, 1)
    with pytest.raises(RunError, match="the disk is full"):
        save(tmp_path, 2, {}, {"state.json": "{}"}, full)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [first.path.name]


def test_a_rank_that_does_not_see_the_runs_folder_says_so_before_the_first_step(tmp_path):
    policy = tiny.policy()
    shards = Shards(policy, torch.optim.AdamW(policy.parameters()), Ranks())
    shards.look_for(tmp_path)
    with pytest.raises(RunError, match=r"not seen by every rank.*a disk that all machines share"):
        shards.look_for(tmp_path / "elsewhere")


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    """A pickle begins with its protocol, a zip of them with PK; here each file is safetensors or text."""
    made = checkpoint(tmp_path, 1)
    for file in made.path.iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        else:
            assert file.suffix == ".json" and json.loads(data) is not None


# -- the policy --------------------------------------------------------------------------------------------------------


def gathering(model, watch=lambda name: None):
    """As ranks put a model's tensors together: each apart, those of two names twice."""

    def gather(take):
        for name, x in model.state_dict().items():
            watch(name)
            take(name, x.clone())

    return gather


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("most", [20_000, 2**32])
def test_a_policy_is_written_file_by_file_and_is_what_transformers_writes(tmp_path, monkeypatch, tied, most):
    monkeypatch.setattr(saving, "FILE_BYTES", most)
    model, ours = tiny.llama(tie_word_embeddings=tied), tmp_path / "ours"
    there = []  # files, whenever the next tensor is asked for
    save_in_files(model, ours, gathering(model, lambda name: there.append(len(list(ours.glob("*.safetensors"))))))
    model.save_pretrained(tmp_path / "theirs")
    assert (ours / "config.json").read_bytes() == (tmp_path / "theirs" / "config.json").read_bytes()
    files = sorted(ours.glob("*.safetensors"))
    written = {name: x for file in files for name, x in load_file(file).items()}
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    assert written.keys() == expected.keys() and all(same(x, written[name]) for name, x in expected.items())
    largest = max(x.nbytes for x in expected.values())
    assert all(sum(x.nbytes for x in load_file(file).values()) <= max(most, largest) for file in files)
    if most == 20_000:
        assert len(files) > 3 and there[-1] >= len(files) - 1 - (not tied)  # none is kept until the end
        assert (
            sum(x.nbytes for x in expected.values())
            == json.loads((ours / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        )
    else:
        assert [file.name for file in files] == ["model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    assert all(same(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_model_that_transformers_takes_apart_on_writing_is_given_to_it_whole(tmp_path):
    model, given = tiny.llama(), {}
    model._weight_conversions = ["of experts"]
    model.save_pretrained = lambda folder, state_dict: given.update(state_dict)
    save_in_files(model, tmp_path, gathering(model))
    assert given.keys() == model.state_dict().keys()
    assert given["lm_head.weight"] is given["model.embed_tokens.weight"]  # which it writes once


def test_the_checksum_is_that_of_a_policy_in_one_piece():
    policy = tiny.policy()
    before = policy.checksum()
    policy.gather = gathering(policy.model)
    assert policy.checksum() == before
