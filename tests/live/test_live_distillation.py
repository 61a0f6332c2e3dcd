"""Losses over a teacher's distribution and DPO's kin beside the functions of TRL and ms-swift, called now."""

import importlib.util
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import lossmith as ls
import lossmith.losses as L

pytestmark = pytest.mark.parity


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = normal(0, 3, 6, 40), normal(1, 3, 6, 40)
MASK = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
IDS = torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(2))


def ours(spec, policy, teacher=TEACHER):
    q, p = policy.log_softmax(-1), teacher.log_softmax(-1)
    chosen = [x.gather(-1, IDS[..., None])[..., 0] for x in (q, p)]
    batch = L.Batch(chosen[0], MASK, vocab_logp=q, teacher_vocab_logp=p, teacher_logp=chosen[1])
    return ls.get_loss(spec)(batch).loss


def same(mine, theirs):
    """Value and gradient in the student's logits of two functions of them."""
    found = []
    for function in (mine, theirs):
        leaf = STUDENT.clone().requires_grad_()
        value = function(leaf)
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def token_mean(per_token):
    return per_token[MASK].sum() / MASK.sum()


def completion_mean(per_token):
    return ((per_token * MASK).sum(1) / MASK.sum(1)).mean()


@pytest.mark.parametrize(
    ("spec", "beta"), [("forward_kl", 0), ("reverse_kl", 1), ("gkd@trl", 0.5), ("gkd(jsd_beta=0.2)", 0.2)]
)
def test_gkd_of_trl(spec, beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    labels = torch.where(MASK, IDS, -100)
    theirs = gkd.GKDTrainer.generalized_jsd_loss
    same(lambda z: ours(spec, z), lambda z: theirs(z, TEACHER, labels, beta=beta))


@pytest.mark.parametrize(("spec", "beta"), [("forward_kl", 0.0), ("distillation@trl", 1.0), ("gkd", 0.5)])
def test_the_chunked_divergence_of_trl(spec, beta):
    """On a head that is the identity, so that hidden states are logits."""
    module = pytest.importorskip("trl.trainer.distillation_trainer")
    eye = torch.eye(40, dtype=torch.float64)

    def theirs(z):
        return module._chunked_divergence_loss(z, TEACHER, eye, eye, MASK, beta)[0]

    value = float(theirs(STUDENT.clone().requires_grad_()).detach())
    assert float(ours(spec, STUDENT)) == pytest.approx(value, rel=1e-5)  # its tiles are float32


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("extra", "alpha"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("gkd", 0.5)])
def test_the_top_k_of_sdpo(extra, alpha, tail):
    utils = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    same(
        lambda z: ours(f"{extra}(distil_top_k=7, distil_tail={tail})", z),
        lambda z: token_mean(
            utils.compute_topk_self_distillation_loss(
                z, TEACHER, distillation_topk=7, distillation_alpha=alpha, distillation_add_tail=tail
            )
        ),
    )


def test_sdpo_of_trl_on_sampled_tokens():
    """Its gradient; its value is another, since the log-ratio is multiplied by a log-probability in both."""
    utils = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    same(
        lambda z: ours("sdpo@trl", z),
        lambda z: completion_mean(
            utils.compute_sampled_token_self_distillation_loss(z, TEACHER, IDS, distillation_alpha=1.0)
        ),
    )


def test_sdft_of_trl():
    utils = pytest.importorskip("trl.experimental.sdft.loss_utils")
    same(
        lambda z: ours("sdft@trl(distil_top_k=7)", z),
        lambda z: completion_mean(
            utils.compute_topk_self_distillation_loss(
                z, TEACHER, distillation_topk=7, distillation_alpha=0.5, distillation_add_tail=False
            )
        ),
    )


def test_iw_opd_of_trl():
    trainer = pytest.importorskip("trl.experimental.iw_opd").IWOPDTrainer
    it = types.SimpleNamespace(
        temperature=1.0, iw_opd_gamma=0.5, iw_opd_epsilon=1e-8, model=types.SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    teacher = TEACHER.log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    labels = torch.where(MASK, IDS, -100)
    same(
        lambda z: ours("iw_opd@trl", z),
        lambda z: trainer._compute_iw_opd_loss(it, z, IDS, labels, teacher),
    )


def swift(file):
    """A module of ms-swift that needs nothing of it but torch."""
    spec = importlib.util.find_spec("swift")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("ms-swift is not installed")
    place = Path(spec.submodule_search_locations[0]) / file
    if not place.exists():
        pytest.skip("this ms-swift has no such file")
    found = importlib.util.spec_from_file_location(place.stem, place)
    module = importlib.util.module_from_spec(found)
    sys.modules[place.stem] = module
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("spec", "beta"), [("forward_kl", 0), ("reverse_kl", 1), ("gkd@ms_swift", 0.5)])
def test_gkd_of_ms_swift(spec, beta):
    module = swift("rlhf_trainers/gkd_loss.py")
    same(
        lambda z: ours(spec, z),
        lambda z: module.jsd_loss(z[MASK], TEACHER[MASK], beta, chunk_size=5) / MASK.sum(),
    )


def test_rlsd_of_ms_swift():
    module = swift("rl_core/advantage.py")
    logp, teacher, reward = -normal(3, 4, 6).abs(), -normal(4, 4, 6).abs(), normal(5, 4)
    group, mask = torch.zeros(4, dtype=torch.int64), torch.arange(6) < torch.tensor([6, 2, 4, 5])[:, None]
    batch = L.Batch(logp, mask, teacher_logp=teacher, reward=reward, group=group)
    base = ls.get_loss("grpo", eps=1e-4, beta=0).credit(batch).advantage[:, 0]
    theirs = module.apply_rlsd_reweight(base, mask, teacher, logp, lam=0.5, clip_range=0.2)
    torch.testing.assert_close(ls.get_loss("rlsd@ms_swift", beta=0).credit(batch).advantage, theirs)


def test_sdar_of_ms_swift():
    module = swift("rl_core/advantage.py")
    mask = torch.ones(3, 6, dtype=torch.bool)
    teacher = -normal(4, 3, 6).abs()
    found = []
    for mine in (True, False):
        logp = (-normal(3, 3, 6).abs()).requires_grad_()
        if mine:
            batch = L.Batch(logp, mask, teacher_logp=teacher)
            value = ls.get_loss("sdar", advantage="zero", advantage_scale="none", trust="logp")(batch).loss
        else:
            value = 0.1 * module.compute_sdar_loss(logp, teacher, mask, 5.0)[0]
        found.append((value.detach(), torch.autograd.grad(value, logp)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# -- DPO's kin ---------------------------------------------------------------------------------------------------------

KIN = {
    "apo_zero": "apo_zero", "apo_down": "apo_down", "nca": "nca_pair", "bco_pair": "bco_pair", "exo": "exo_pair",
    "sppo_hard": "sppo_hard", "aot": "aot", "aot_unpaired": "aot_unpaired", "dpo": "sigmoid", "dpo_hinge": "hinge",
}  # fmt: skip


@pytest.mark.parametrize("name", KIN)
def test_dpo_of_trl(name, tmp_path):
    """TRL's own DPOTrainer on a tiny model whose log-probabilities are moved off the reference's."""
    trl = pytest.importorskip("trl")
    import datasets

    import tiny

    model, reference = tiny.llama().double(), tiny.llama(seed=4).double()
    tokenizer = tiny.tokenizer()
    rows = [{"prompt": f"Say {i}:", "chosen": f" {'yes ' * (i + 1)}", "rejected": f" no, {i} times"} for i in range(4)]
    smoothing = {"label_smoothing": 1e-3} if name == "exo" else {}
    args = trl.DPOConfig(
        str(tmp_path), loss_type=KIN[name], beta=0.1, per_device_train_batch_size=4, use_cpu=True, bf16=False,
        report_to=[], max_length=None, **smoothing,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model,
        ref_model=reference,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    theirs = float(trainer.compute_loss(trainer.model, inputs).detach())

    ids, mask = inputs["input_ids"], inputs["completion_mask"]
    counted = mask[:, 1:].bool() & inputs["attention_mask"][:, 1:].bool()

    def logp(of):
        logits = of(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
        return torch.where(counted, logits.gather(-1, ids[:, 1:, None])[..., 0], 0.0).detach()

    pairs = len(ids) // 2
    batch = L.Batch(
        logp(model), counted, ref_logp=logp(reference),
        reward=torch.tensor([1.0] * pairs + [0.0] * pairs), group=torch.arange(pairs).repeat(2),
    )  # fmt: skip
    loss = ls.get_loss(name, beta=0.1)
    assert float(loss(batch).loss) == pytest.approx(theirs, rel=1e-5)
