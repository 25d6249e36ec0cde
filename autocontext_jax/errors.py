"""The one kind of error that is the user's to mend, not ours."""


class UserError(Exception):
    """A mistake in the data, the configuration or the command line.

    Its message is one line: what is wrong, where, the value found, the value wanted, what to do. `main.py` prints that
    line on standard error and ends with status 2; every other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        # What it quotes may come from a broken file: a line end in a name must not make two lines of it.
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
        super().__init__(line if len(line) <= 4000 else f"{line[:4000]} …")
