"""Tasks: the data and metrics that networks are trained and evaluated with. `create_task("denoising", data=folder, sigma=25)`."""

from surgeon.zoo.tasks.base import Batch, Sample, Split, Task, TaskConfig, TaskDataset, better, improved
from surgeon.zoo.tasks.registry import create_task, register, task_class, task_names

__all__ = [
    "Batch",
    "Sample",
    "Split",
    "Task",
    "TaskConfig",
    "TaskDataset",
    "better",
    "create_task",
    "improved",
    "register",
    "task_class",
    "task_names",
]
