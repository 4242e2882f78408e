"""The tasks. This union is the registry: a new task is one file beside this one, and its line here."""

from cnnrun.tasks.classification import Classify
from cnnrun.tasks.detection.task import Detect
from cnnrun.tasks.embedding.task import Verify
from cnnrun.tasks.multilabel import Multilabel
from cnnrun.tasks.regression.task import Regress

Task = Classify | Multilabel | Regress | Detect | Verify
