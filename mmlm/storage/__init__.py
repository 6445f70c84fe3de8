"""Files that must not be lost: atomic writes, append logs, content hashes, the cache on disk.

    atomic   a file or folder is there whole, or as it was before
    hashing  sha256 of files and folders
    cache    where MMLM keeps what it can make again
    parts    files inside installed Python packages

This room knows bytes and names, and nothing of models, data or runs. It needs no torch.
"""

from mmlm.storage.atomic import AppendLog as AppendLog
from mmlm.storage.atomic import atomic_folder as atomic_folder
from mmlm.storage.atomic import write_atomic as write_atomic
from mmlm.storage.cache import cache_folder as cache_folder
from mmlm.storage.cache import cache_root as cache_root
from mmlm.storage.hashing import sha256_of_file as sha256_of_file
from mmlm.storage.hashing import sha256_of_folder as sha256_of_folder
