"""The one kind of error that is the user's to mend, not ours."""


class UserError(Exception):
    """A mistake in the data, the configuration or the command line.

    Its message is one line: what is wrong, where, the value found, the value wanted, what to do. `main.py` prints that
    line on standard error and ends with status 2; every other exception is a bug and keeps its traceback.
    """
