"""The one exception that speaks to people: a refusal, worded `WHAT (WHERE). FIX`."""


class Refused(ValueError):
    """Something that a second try would refuse in the same way: bad flags, a broken package, a port in use.

    The entry point prints it as `error: WHAT (WHERE). FIX` and exits 2.
    """

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(f"{what} ({where}). {fix}")

    @classmethod
    def repeated(cls, text: str) -> "Refused":
        """A refusal that another process worded."""
        error = cls.__new__(cls)
        ValueError.__init__(error, text)
        return error
