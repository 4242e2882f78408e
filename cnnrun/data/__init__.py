"""The data sources. This union is the registry: a new source is one file beside this one, and its line here."""

from cnnrun.data.digits import Digits
from cnnrun.data.folder import Folder
from cnnrun.data.idx import Idx

Source = Digits | Idx | Folder
