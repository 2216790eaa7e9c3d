"""The one exception people see."""


class UdedupError(Exception):
    """Something a person can put right: the text is one line that says what failed, on what, why and what to do."""
