"""The data sources. This union is the registry: a new source is one file beside this one, and its line here."""

from cnnrun.data.arrays import Arrays
from cnnrun.data.coco import Coco
from cnnrun.data.digit_scenes import DigitScenes
from cnnrun.data.digits import Digits
from cnnrun.data.folder import Folder
from cnnrun.data.idx import Idx
from cnnrun.data.shards import Shards
from cnnrun.data.table import Table
from cnnrun.data.voc import Voc

Source = Digits | Idx | Folder | Table | Arrays | Shards | Coco | Voc | DigitScenes
