"""Fine-tuning a converted (or plain) network on a task: `finetune(model, task, FinetuneConfig(epochs=10), "runs/mine")`."""

from surgeon.zoo.finetune.config import FinetuneConfig
from surgeon.zoo.finetune.dry import dry_run
from surgeon.zoo.finetune.networks import Source
from surgeon.zoo.finetune.run import FinetuneResult, finetune

__all__ = ["FinetuneConfig", "FinetuneResult", "Source", "dry_run", "finetune"]
