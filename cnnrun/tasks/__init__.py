"""The kinds of task. To add one, write its module in this package and add its class to the union `TaskUnion`.

Other packages know a task by `contracts.task.Task`. `__all__` names only what they import besides.
"""

from cnnrun.tasks.classification import Classify
from cnnrun.tasks.detection.task import Detect
from cnnrun.tasks.embedding.task import Verify
from cnnrun.tasks.multilabel import Multilabel
from cnnrun.tasks.regression.task import Regress
from cnnrun.tasks.segmentation.task import Segment

__all__ = [
    "TaskUnion",
    "classification_metrics",
    "embedding",
    "intervals",
    "multilabel_losses",
    "regression",
    "temperature",
]


TaskUnion = Classify | Multilabel | Regress | Detect | Verify | Segment
