"""The preference files that Lossmith writes are read by TRL's trainers, and TRL learns a step from them."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py stands one folder up

import tiny
from lossmith.feedback.output_set import named
from lossmith.feedback.preferences import Label, Pair, write_preferences
from lossmith.prompts import Prompt

pytestmark = [
    pytest.mark.parity,
    # what TRL and the libraries under it warn of on this machine
    pytest.mark.filterwarnings("ignore"),
]

CHATS = [Prompt(f"Question {i}?") for i in range(8)]


@pytest.fixture
def pairs(tmp_path):
    """All that an export may hold: names, tokens, soft labels, weights, and a margin in some rows."""
    made = [
        Pair(
            prompt,
            named(prompt, f"a good answer {i}", (65, 66, 256)),
            named(prompt, "bad", (66, 256)),
            0.5 + i / 16,
            margin=0.25 * (i % 2),
            weight=1 / (1 + i % 3),
            annotator="ann",
        )
        for i, prompt in enumerate(CHATS)
    ]
    write_preferences(tmp_path / "pairs.jsonl", made)
    return tmp_path / "pairs.jsonl"


def model_and_tokenizer():
    import transformers

    folder = str(tiny.folder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder), tokenizer


def settings(tmp_path, **more):
    return dict(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, bf16=False, max_length=64, gradient_checkpointing=False, **more,
    )  # fmt: skip


def loss_of(trainer):
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def read(path):
    import datasets

    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))


def test_dpo(tmp_path, pairs):
    trl = pytest.importorskip("trl")
    model, tokenizer = model_and_tokenizer()
    trainer = trl.DPOTrainer(
        model, args=trl.DPOConfig(**settings(tmp_path)), train_dataset=read(pairs), processing_class=tokenizer
    )
    assert loss_of(trainer) == pytest.approx(math.log(2), rel=1e-3)  # the policy is still the reference


def test_reward_model(tmp_path, pairs):
    trl = pytest.importorskip("trl")
    import transformers

    _, tokenizer = model_and_tokenizer()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(tiny.folder()), num_labels=1)
    trainer = trl.RewardTrainer(
        model, args=trl.RewardConfig(**settings(tmp_path)), train_dataset=read(pairs), processing_class=tokenizer
    )
    assert math.isfinite(loss_of(trainer))


def test_kto(tmp_path):
    trl = pytest.importorskip("trl")
    kto = getattr(trl, "KTOTrainer", None)
    if kto is None:
        pytest.skip("this TRL has no KTOTrainer among its stable trainers")
    labels = [Label(p, named(p, f"answer {i}", (65, 256)), i % 2 == 0, "ann") for i, p in enumerate(CHATS)]
    write_preferences(tmp_path / "labels.jsonl", labels)
    model, tokenizer = model_and_tokenizer()
    trainer = kto(
        model,
        args=trl.KTOConfig(**settings(tmp_path)),
        train_dataset=read(tmp_path / "labels.jsonl"),
        processing_class=tokenizer,
    )
    assert loss_of(trainer) == pytest.approx(0.5, rel=1e-2)  # σ(0) on both sides
