"""The tasks. This union is the registry: a new task is one file beside this one, and its line here."""

from cnnrun.tasks.classify import Classify
from cnnrun.tasks.detect import Detect
from cnnrun.tasks.multilabel import Multilabel
from cnnrun.tasks.regress import Regress
from cnnrun.tasks.verify import Verify

Task = Classify | Multilabel | Regress | Detect | Verify
