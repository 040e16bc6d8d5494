"""The one exception that stands for a mistake a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: its message is one line that names the key or file, the value found and the remedy.

    `cjepa_fast.train` prints the message and exits with code 2; a library caller sees a `ValueError`.
    """
