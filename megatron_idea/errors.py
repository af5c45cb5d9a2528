"""What the user can mend, as opposed to our own bugs."""

from __future__ import annotations


class UserError(ValueError):
    """Something given that cannot be used; the message says what is legal and how to mend it.

    The command line shows it as one line. It takes one text, so that ``agree_or_raise`` can raise
    it on other ranks. Any other exception, a plain ValueError too, is a bug.
    """
