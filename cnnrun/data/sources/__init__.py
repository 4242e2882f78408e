"""The data sources. To add one, write its module in this package and add its class to the union `Source`."""

from cnnrun.data.sources.arrays import Arrays
from cnnrun.data.sources.coco import Coco
from cnnrun.data.sources.digit_scenes import DigitScenes
from cnnrun.data.sources.digits import Digits
from cnnrun.data.sources.folder import Folder
from cnnrun.data.sources.idx import Idx
from cnnrun.data.sources.masks import MaskFolders
from cnnrun.data.sources.shards import Shards
from cnnrun.data.sources.table import Table
from cnnrun.data.sources.voc import Voc
from cnnrun.data.sources.yolo import Yolo

__all__ = ["Source", "table_files", "yolo"]


Source = Digits | Idx | Folder | Table | Arrays | Shards | Coco | Voc | Yolo | DigitScenes | MaskFolders
