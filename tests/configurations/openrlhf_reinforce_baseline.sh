#!/bin/bash
# REINFORCE++-baseline in OpenRLHF: the group's mean as baseline, advantages whitened, k2 in the loss.
set -x

WORK_DIR=$(cd "$(dirname "$0")/.." && pwd)
SAVE_PATH="${WORK_DIR}/exp/Qwen3-4B"

CKPT_ARGS=(
   --actor.model_name_or_path Qwen/Qwen3-4B
   --ckpt.output_dir ${SAVE_PATH}
   --ckpt.path "${SAVE_PATH}/ckpt"
   --ckpt.save_hf
   --ckpt.save_steps 10
)

ROLLOUT_ARGS=(
   --reward.remote_url reward_func.py
   --data.prompt_dataset zhuzilin/dapo-math-17k
   --data.input_key prompt
   --data.label_key label
   --data.max_len 74240
   --rollout.max_new_tokens 64000
   --data.apply_chat_template
   --rollout.batch_size 128
   --rollout.n_samples_per_prompt 8
   --train.batch_size 1024
   --train.micro_batch_size 1
)

ENGINE_ARGS=(
   --ref.num_nodes 1
   --actor.num_nodes 1
   --actor.num_gpus_per_node 8
   --vllm.num_engines 4
   --vllm.gpu_memory_utilization 0.6
   --train.colocate_all
   --ds.zero_stage 3
   # --ds.adam_offload
)

OPTIMIZER_ARGS=(
   --algo.advantage.estimator reinforce_baseline
   --actor.adam.lr 5e-7
   --actor.entropy_coef 0.0
   --actor.eps_clip_low_high 0.2 0.3
   --algo.kl.init_coef 1e-5
   --algo.kl.use_loss
   --algo.kl.estimator k2
   --algo.advantage.is_correction_level token
   --algo.advantage.is_correction_threshold 0.5 5.0
)

ray job submit --address="http://127.0.0.1:8265" \
   -- python3 -m openrlhf.cli.train_ppo_ray \
   ${CKPT_ARGS[@]} \
   ${ROLLOUT_ARGS[@]} \
   ${ENGINE_ARGS[@]} \
   ${OPTIMIZER_ARGS[@]}
