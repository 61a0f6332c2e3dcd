"""GSPO in TRL, after its page on papers: a sequence ratio, narrow bounds, no KL."""

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward

EPSILON = 3e-4

training_args = GRPOConfig(
    output_dir="out/gspo",
    importance_sampling_level="sequence",
    loss_type="grpo",
    beta=0.0,
    epsilon=EPSILON,
    epsilon_high=4e-4,
    gradient_accumulation_steps=1,
    steps_per_generation=4,
    per_device_train_batch_size=16,
    num_generations=8,
    learning_rate=1e-6,
)

trainer = GRPOTrainer(
    model="Qwen/Qwen3-0.6B",
    reward_funcs=accuracy_reward,
    args=training_args,
    train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
)
trainer.train()
