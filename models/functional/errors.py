"""The one exception that reaches a user as a sentence instead of a stack trace."""


class UsageError(ValueError):
    """An option, a file or a checkpoint that cannot work.

    The message names what was given and says what to type instead; `run.py` prints it without a traceback.
    """
