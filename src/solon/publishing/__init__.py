"""What Solon may write over, and how a finished output takes the place of an old one.

Only what is absent, empty or Solon's own is written or replaced. Solon knows its own by a mark: `solon.json` in a
directory, with the names and contents of all files that Solon put there, and `NAME.solon.json` beside a file. The mark
also keeps the output's identity: everything that made it. A command that finds an output of another identity says what
differs.

`places` says what may be written; `directories` and `files` write; `content` hashes what stands on disk.
"""

from solon.publishing.directories import (
    Directory,
    directory,
    new_directory,
    publish,
    recover,
    recover_all,
)
from solon.publishing.files import File, check_own_json, file, mark_path, write_json
from solon.publishing.places import (
    MARK,
    Identity,
    check_identity,
    checked_place,
    differences,
    mark_of,
    write_whole,
)

__all__ = [
    "MARK",
    "Directory",
    "File",
    "Identity",
    "check_identity",
    "check_own_json",
    "checked_place",
    "differences",
    "directory",
    "file",
    "mark_of",
    "mark_path",
    "new_directory",
    "publish",
    "recover",
    "recover_all",
    "write_json",
    "write_whole",
]
