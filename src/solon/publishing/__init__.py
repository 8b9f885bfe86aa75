"""Which paths Solon may write over, and how a finished output takes the place of an old one.

Solon writes or replaces only a path that is absent, empty or marked as Solon's. The mark is `solon.json` in a directory, with the
names and contents of all files that Solon wrote there, and `NAME.solon.json` beside a file. The mark also holds the output's
identity: everything that the output was made from. A command that finds an output of another identity says what differs.

`places` decides where Solon may write; `directories` and `files` write; `content` computes hashes of files on disk.
"""

from solon.publishing.directories import Directory, directory, new_directory, publish, recover, recover_all
from solon.publishing.files import BEGIN_ANEW, File, check_json, file, mark_path, write_json
from solon.publishing.places import MARK, Identity, check_identity, differences, mark_of, resolve_output, write_whole

__all__ = [
    "BEGIN_ANEW",
    "MARK",
    "Directory",
    "File",
    "Identity",
    "check_identity",
    "check_json",
    "differences",
    "directory",
    "file",
    "mark_of",
    "mark_path",
    "new_directory",
    "publish",
    "recover",
    "recover_all",
    "resolve_output",
    "write_json",
    "write_whole",
]
