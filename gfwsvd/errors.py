"""The one exception type that a user of gfwsvd has to know."""


class GfwsvdError(ValueError):
    """A request that cannot be met as asked: the message says what was expected, what came, and what to do.

    Nothing is left half-done when it is raised: models keep their layers and no output file or folder appears.
    """
