set -x

# GRPO on GSM8K with SkyRL
# uv run examples/gsm8k_dataset.py --output_dir $HOME/data/gsm8k

: "${DATA_DIR:="$HOME/data/gsm8k"}"
: "${NUM_GPUS:=4}"
: "${KL:=0.002}"

uv run --isolated --extra fsdp -m skyrl.train.entrypoints.main_base \
  data.train_data="['$DATA_DIR/train.parquet']" \
  data.val_data="['$DATA_DIR/validation.parquet']" \
  trainer.algorithm.advantage_estimator="grpo" \
  trainer.algorithm.policy_loss_type="dual_clip" \
  trainer.algorithm.eps_clip_high=0.28 \
  trainer.algorithm.use_kl_loss=true \
  trainer.algorithm.kl_loss_coef=$KL \
  trainer.algorithm.off_policy_correction.tis_ratio_type=token \
  trainer.policy.model.path="Qwen/Qwen2.5-1.5B-Instruct" \
  trainer.placement.colocate_all=true \
  trainer.strategy=fsdp \
  trainer.epochs=20 \
  trainer.train_batch_size=1024 \
  trainer.policy_mini_batch_size=256 \
  trainer.micro_train_batch_size_per_gpu=64 \
  trainer.policy.optimizer_config.lr=1.0e-6 \
  generator.inference_engine.num_engines=$NUM_GPUS \
  generator.sampling_params.max_generate_length=1024 \
  generator.n_samples_per_prompt=5 \
  environment.env_class=gsm8k \
  trainer.logger="wandb" \
  $@
