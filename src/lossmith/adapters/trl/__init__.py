"""Any loss of Lossmith inside TRL's GRPOTrainer (TRL 1.16 or newer: `pip install lossmith[trl]`).

from lossmith.adapters.trl import LossmithGRPOTrainer
trainer = LossmithGRPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=..., loss="dppo_tv")
trainer.train()

`loss_of(GRPOConfig(...))` is the loss that TRL's own trainer would train with.
"""

from typing import TYPE_CHECKING

from lossmith.lazy import lazy_names

if TYPE_CHECKING:
    from lossmith.adapters.configurations.trl import loss_of
    from lossmith.adapters.trl.trainer import LossmithGRPOTrainer

__all__ = ["LossmithGRPOTrainer", "loss_of"]

__getattr__ = lazy_names(__name__, __file__)
